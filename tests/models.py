"""Tiny random models of the architectures rerankers have, as folders for ``CrossEncoder``; nothing is downloaded.

Their weights are drawn wide, so that scores differ from text to text: with the usual narrow ones every pair would score
the same, and every comparison would pass.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

with warnings.catch_warnings():  # the libraries' own affair
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from sentence_transformers import CrossEncoder
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers import models as algorithms

MAX_LENGTH = 128

TEXT = """
How many people live in Berlin? Berlin had a population of 3,520,031 registered inhabitants in an area of 891 km².
Birds fly because their wings give lift. Bread is baked of flour, water, salt and yeast. yes no
Le pain est fait de farine, d'eau, de sel et de levure. Die Vögel fliegen mit ihren Flügeln. Köln, Straße, Größe.
Сколько людей живёт в Берлине? Хлеб пекут из муки. Πόσοι άνθρωποι ζουν στο Βερολίνο;
柏林有多少人口？面包是用面粉烤的。鳥は翼で飛ぶ。ベルリンの人口。새는 날개로 난다.
كم عدد سكان برلين؟ כמה אנשים גרים בברלין? बर्लिन में कितने लोग रहते हैं?
""".strip().splitlines()

#: whether attention of every family goes through transformers' interface, or in older versions decoders' alone
ATTENTION_IS_OPEN = hasattr(transformers.models.bert.modeling_bert, "ALL_ATTENTION_FUNCTIONS")
#: "gte": the "new" architecture of Alibaba's GTE, as far as the installed transformers has it
ENCODERS = (
    *("bert", "roberta", "xlm-roberta", "deberta-v2", "electra", "modernbert", "albert", "distilbert"),
    *(("gte",) if hasattr(transformers, "GteConfig") else ()),
)
DECODERS = ("qwen3", "llama", "qwen2", "mistral", "gemma", "gemma2", "gemma3")
#: An encoder without a head, a pooling of first tokens, and linear layers: as Ettin's rerankers are. Needs
#: sentence-transformers 6.
MODULAR = "ettin"
# A decoder without a classification head: the score is the logit of "yes" less that of "no". What sentence-transformers
# makes of such a model depends on its version, hence apart.
LOGIT_SCORE = "qwen3-logit-score"


def has_logit_score() -> bool:
    """Whether the installed sentence-transformers makes models of modules, and scores with a decoder's own logits."""
    return importlib.util.find_spec("sentence_transformers.cross_encoder.modules") is not None


#: All families, as far as the installed sentence-transformers has what they need.
FAMILIES = (*ENCODERS, *DECODERS, *((MODULAR, LOGIT_SCORE) if has_logit_score() else ()))


def build(family: str, folder: Path, num_labels: int = 1, layers: int = 2) -> str:
    """Make a model of ``family`` in ``folder``, with so many layers where it is of one network alone; its path."""
    if family == LOGIT_SCORE:
        return _build_logit_score(folder)
    if family == MODULAR:
        return _build_modular(folder, num_labels)
    tokenizer = _tokenizer(family)
    model = _model(family, tokenizer, num_labels, layers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build_headless(folder: Path) -> str:
    """A checkpoint of the encoder alone: whoever loads it as a cross-encoder gets a random head."""
    tokenizer = _tokenizer("bert")
    model = _model("bert", tokenizer, 1)
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(path: str, device: str, **options: Any) -> CrossEncoder:
    """The ``CrossEncoder`` a pool is held against, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CrossEncoder(path, device=device, **options)
        model.predict([("query", "document")])  # what it warns of, it warns of once
    return model


def load_on_meta(spec: object, device: str) -> CrossEncoder:
    """A loader that leaves one parameter without its data."""
    model = load(spec.name, device)  # type: ignore[attr-defined]
    model.model.classifier.to("meta")
    return model


def load_elsewhere(spec: object, device: str) -> CrossEncoder:
    """A loader that takes no notice of its device, nor tells anybody."""
    model = load(spec.name, device)  # type: ignore[attr-defined]
    model.to("meta" if device == "cpu" else "cpu")
    return model


def load_writing(spec: object, device: str) -> CrossEncoder:
    """A loader of a model that adds 1 to one of its weights when it is given the document ``!write``."""
    model = load(spec.name, device)  # type: ignore[attr-defined]
    predict = model.predict

    def predict_and_write(pairs: Any, **options: Any) -> Any:
        scores = predict(pairs, **options)
        if any(document == "!write" for _, document in pairs):
            with torch.no_grad():
                model.model.classifier.bias += 1.0
        return scores

    model.predict = predict_and_write
    return model


def coarse(logits: torch.Tensor) -> torch.Tensor:
    """An activation under which many scores are equal."""
    return torch.round(logits * 4) / 4


def cudnn_attention(logits: torch.Tensor) -> torch.Tensor:
    """An activation that says whether attention may be cuDNN's in this process: 1 or 0."""
    return torch.full_like(logits, torch.backends.cuda.cudnn_sdp_enabled())


def load_lengthwise(spec: object, device: str) -> torch.nn.Module:
    """A torch module that is no ``CrossEncoder`` and has the pool's ``predict(pairs)``."""
    return Lengthwise().to(device)


class Lengthwise(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5]))

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        return [self.weight.item() * len(document) for _, document in pairs]


def _model(family: str, tokenizer: Any, num_labels: int, layers: int = 2) -> Any:
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "num_labels": num_labels,
        "initializer_range": 0.2,
    }
    if family == "bert":
        config = transformers.BertConfig(**size)
    elif family == "roberta":  # positions start after the padding's
        config = transformers.RobertaConfig(**{**size, "max_position_embeddings": MAX_LENGTH + 2}, type_vocab_size=1)
    elif family == "xlm-roberta":
        config = transformers.XLMRobertaConfig(**{**size, "max_position_embeddings": MAX_LENGTH + 2}, type_vocab_size=1)
    elif family == "deberta-v2":
        config = transformers.DebertaV2Config(
            **size,
            relative_attention=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
            pooler_hidden_size=32,
        )
    elif family == "electra":
        config = transformers.ElectraConfig(**size, embedding_size=16)
    elif family == "albert":
        config = transformers.AlbertConfig(**size, embedding_size=16)
    elif family == "distilbert":
        renamed = {"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers"}
        renamed["num_attention_heads"] = "n_heads"
        config = transformers.DistilBertConfig(**{renamed.get(name, name): value for name, value in size.items()})
    elif family == "gte":
        config = transformers.GteConfig(**size)
    elif family in ("modernbert", MODULAR):
        config = transformers.ModernBertConfig(
            **size,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            global_attn_every_n_layers=2,
            local_attention=16,
            # Else transformers 4 asks torch's compiler, whose processes outlive the test that made them start.
            reference_compile=False,
        )
    elif family in ("qwen3", LOGIT_SCORE):
        config = transformers.Qwen3Config(**size, num_key_value_heads=2, head_dim=8)
    elif family == "llama":
        config = transformers.LlamaConfig(**size, num_key_value_heads=2)
    elif family == "qwen2":
        config = transformers.Qwen2Config(**size, num_key_value_heads=2)
    elif family == "mistral":
        config = transformers.MistralConfig(**size, num_key_value_heads=2, sliding_window=16)
    elif family == "gemma":
        config = transformers.GemmaConfig(**size, num_key_value_heads=1, head_dim=8)
    elif family in ("gemma2", "gemma3"):  # every other layer has a window
        size |= {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
        size["layer_types"] = ["sliding_attention", "full_attention"]
        if family == "gemma2":  # a softcap so low that scores feel it
            config = transformers.Gemma2Config(**size, attn_logit_softcapping=0.5)
        else:
            config = transformers.Gemma3TextConfig(**size)
    else:
        raise ValueError(family)
    seed = 1 if family == "roberta" else 0  # with 0, all its scores happen to be near 1
    torch.manual_seed(sum(family.encode()) + num_labels + seed)
    auto = {LOGIT_SCORE: transformers.AutoModelForCausalLM, MODULAR: transformers.AutoModel}.get(
        family, transformers.AutoModelForSequenceClassification
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("classifier", "score", "pooler", "head", "lm_head")):
                wide = 0.5 if family in ("roberta", "xlm-roberta", "modernbert") else 0.25
                parameter.normal_(std=0.0 if name.endswith("bias") else wide)  # a sigmoid is flat far from 0
    return model.eval()


def _build_logit_score(folder: Path) -> str:
    """As the published ones are: with a chat template, and a default prompt that goes into it."""
    bare = folder / "bare"
    tokenizer = _tokenizer(LOGIT_SCORE)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}<assistant>"
    )
    _model(LOGIT_SCORE, tokenizer, 1).save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CrossEncoder(
            str(bare),
            device="cpu",
            prompts={"web": "Is this the answer? "},
            default_prompt_name="web",
        ).save_pretrained(str(folder / "whole"))
    return str(folder / "whole")


def _build_modular(folder: Path, num_labels: int) -> str:
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    bare = folder / "bare"
    tokenizer = _tokenizer(MODULAR)
    _model(MODULAR, tokenizer, num_labels).save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [
            Transformer(str(bare), transformer_task="feature-extraction"),
            Pooling(32, "cls"),
            Dense(32, 32, bias=False, activation_function=torch.nn.GELU()),
            LayerNorm(32),
            Dense(32, num_labels, activation_function=torch.nn.Identity(), module_output_name="scores"),
        ]
        CrossEncoder(modules=modules, device="cpu").save_pretrained(str(folder / "whole"))
    return str(folder / "whole")


def _tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the kind the family has, trained on the few lines above."""
    kind = {
        "bert": "wordpiece",
        "electra": "wordpiece",
        "distilbert": "wordpiece",
        "xlm-roberta": "unigram",
        "deberta-v2": "unigram",
        "albert": "unigram",
    }.get(family, "bytes")
    cls, sep, pad, unk = ("[CLS]", "[SEP]", "[PAD]", "[UNK]")
    if family in ("roberta", "xlm-roberta"):
        cls, sep, pad, unk = ("<s>", "</s>", "<pad>", "<unk>")
    special = [cls, pad, sep, unk]  # RoBERTa's padding has number 1
    # Not trained by the library: among equals, that takes another one in each run.
    if kind == "wordpiece":
        tokenizer = Tokenizer(algorithms.WordPiece(unk_token=unk))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        words = _words(tokenizer)
        letters = sorted(set("".join(words)))
        pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
        tokenizer.model = algorithms.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=unk)
    elif kind == "unigram":
        tokenizer = Tokenizer(algorithms.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        words = _words(tokenizer)
        likely = {**dict.fromkeys(sorted(set("".join(words))), -9.0), **dict.fromkeys(words, -5.0)}
        pieces = {**dict.fromkeys(special, 0.0), **likely}
        tokenizer.model = algorithms.Unigram(list(pieces.items()), special.index(unk))
    else:
        tokenizer = Tokenizer(algorithms.BPE())
        # No space is put before the texts of these, as in the real ones.
        spaced = family not in ("modernbert", MODULAR)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
        tokenizer.decoder = decoders.ByteLevel()
        merges = _merges(_words(tokenizer), 240)
        pieces = dict.fromkeys([*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)])
        tokenizer.model = algorithms.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    tokenizer.add_special_tokens(special)
    if family in ("modernbert", MODULAR):
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in (2, 3, 4)])
    names: dict[str, str] = {"pad_token": pad, "unk_token": unk}
    inputs = ["input_ids", "attention_mask"]
    if family in DECODERS or family == LOGIT_SCORE:
        names["eos_token"] = sep
        if family == "llama":
            names["bos_token"] = cls
            tokenizer.post_processor = _template(tokenizer, f"{cls} $A", f"{cls} $A {cls}:1 $B:1", cls)
        if family == LOGIT_SCORE:
            tokenizer.add_tokens(["yes", "no"])
    else:
        names |= {"cls_token": cls, "sep_token": sep, "mask_token": "[MASK]", "bos_token": cls, "eos_token": sep}
        if family in ("roberta", "xlm-roberta"):
            single, pair = f"{cls} $A {sep}", f"{cls} $A {sep} {sep} $B {sep}"
        else:
            single, pair = f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1"
        tokenizer.post_processor = _template(tokenizer, single, pair, cls, sep)
        if family in ("bert", "electra", "albert"):
            inputs.append("token_type_ids")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, model_input_names=inputs, **names
    )


def _words(tokenizer: Tokenizer) -> list[str]:
    """The words of the lines above as ``tokenizer`` cuts them, the most frequent first."""
    normal = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    found = Counter(word for line in TEXT for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal(line)))
    return sorted(found, key=lambda word: (-found[word], word))


def _merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """The first ``count`` merges of byte pair encoding, of equally frequent ones the first in order."""
    spelled = [list(word) for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for word in spelled for pair in pairwise(word))
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((first, second))
        for word in spelled:
            for i in reversed(range(len(word) - 1)):
                if (word[i], word[i + 1]) == (first, second):
                    word[i : i + 2] = [first + second]
    return merges


def _template(tokenizer: Tokenizer, single: str, pair: str, *special: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in special]
    )
