"""The student before training: the lower layers of the bi-encoder, with a smaller vocabulary."""

import collections
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModel, BertConfig, BertForSequenceClassification

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def choose_vocabulary(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> list[str]:
    """`size` tokens in the original's order.

    Every single character stays, so that no text becomes unreadable (continued CJK characters go: the tokenizer sets
    those apart, and never continues one). The rest are taken by turns from the original's own order, which is by
    frequency in general English, and from the counts in the training text.
    """
    ids = tokenizer.get_vocab()
    ordered = sorted(ids, key=ids.__getitem__)
    counts: collections.Counter[str] = collections.Counter()
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.tokens)

    def is_character(token: str) -> bool:
        bare = token.removeprefix("##")
        return len(bare) == 1 and not (token != bare and "\u3400" <= bare <= "\u9fff")

    kept = {token for token in ordered if token in SPECIAL or is_character(token)}
    general = [token for token in ordered if not token.startswith("[unused")]
    for pair in zip(general, (token for token, _ in counts.most_common()), strict=False):
        for token in pair:
            if len(kept) < size:
                kept.add(token)
    for token in general:
        if len(kept) < size:
            kept.add(token)
    return [token for token in ordered if token in kept]


def prune_tokenizer(source: Path, vocabulary: list[str]) -> Tokenizer:
    """The source's tokenizer with fewer tokens: a word that is left out is split into tokens that remain."""
    state = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token: number for number, token in enumerate(vocabulary)}
    state["model"]["vocab"] = ids
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["id"] = ids[token["content"]]
    for name, token in state["post_processor"]["special_tokens"].items():
        token["ids"] = [ids[name]]
    return Tokenizer.from_str(json.dumps(state))


def build(source: Path, vocabulary: list[str], layers: int) -> BertForSequenceClassification:
    """A one-label classifier with the source's embeddings, first `layers` layers and pooler."""
    original = AutoModel.from_pretrained(source)
    ids = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=original.config.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=original.config.num_attention_heads,
        intermediate_size=original.config.intermediate_size,
        num_labels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    state = {name: value for name, value in original.state_dict().items() if name in model.bert.state_dict()}
    words = "embeddings.word_embeddings.weight"
    state[words] = state[words][torch.tensor([ids[token] for token in vocabulary])]
    model.bert.load_state_dict(state, strict=False)
    return model
