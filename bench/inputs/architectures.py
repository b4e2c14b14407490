"""Rerankers of the architectures people choose, in their shapes, with random weights and the built-in tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from tokenizers.processors import TemplateProcessing

from mp_rerank.config import BUILTIN_FOLDER

__all__ = ["ARCHITECTURES", "make_architecture", "make_decoder"]

#: what Qwen3's reranker is asked, in our words: one prefix for all documents of a query, and a short end
CHAT_TEMPLATE = """<|im_start|>system
Say whether the document answers the query, as the instruction asks for. The answer is either "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: Given a question to a search engine, find the passages that answer it
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
<|im_start|>assistant
<think>

</think>

"""


def make_architecture(name: str, folder: str) -> str:
    """Save a reranker of the shape `name` in `folder`; the path to load it from."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUILTIN_FOLDER)
    if name != "minilm-l6":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return ARCHITECTURES[name](Path(folder), tokenizer)


def make_decoder(folder: str, layers: int) -> str:
    """Save a reranker of Qwen3-0.6B's shape with so many layers and a classification head in `folder`; its path.

    A pair is its query's tokens and its document's, and nothing else.
    """
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUILTIN_FOLDER)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.model_max_length = 2048
    return classifier(Path(folder), tokenizer, family="qwen3", **_size(1024, 3072, layers, 16), **QWEN3)


def classifier(folder: Path, tokenizer: Any, *, family: str, **size: Any) -> str:
    """A network with a classification head."""
    config = transformers.AutoConfig.for_model(family, **_config(tokenizer, size))
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ettin(folder: Path, tokenizer: Any, **size: Any) -> str:
    """ModernBERT without a head, and modules of sentence-transformers', as Ettin's rerankers have them."""
    config = transformers.ModernBertConfig(**_config(tokenizer, size))
    width = config.hidden_size
    with tempfile.TemporaryDirectory() as bare:
        transformers.ModernBertModel(config).save_pretrained(bare)
        tokenizer.save_pretrained(bare)
        modules = [
            Transformer(bare, transformer_task="feature-extraction"),
            Pooling(width, "cls"),
            Dense(width, width, bias=False, activation_function=torch.nn.GELU()),
            LayerNorm(width),
            Dense(width, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
        ]
    CrossEncoder(modules=modules, device="cpu").save_pretrained(str(folder))
    return str(folder)


def logit_score(folder: Path, tokenizer: Any, **size: Any) -> str:
    """A decoder whose score is the logit of "yes" less that of "no", asked by a chat template."""
    tokenizer.chat_template = CHAT_TEMPLATE
    config = transformers.Qwen3Config(**_config(tokenizer, size))
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _config(tokenizer: Any, size: dict[str, Any]) -> dict[str, Any]:
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    numbers = {"pad": tokenizer.pad_token_id, "bos": first, "eos": last, "cls": first, "sep": last}
    ids = {f"{name}_token_id": number for name, number in numbers.items()}
    # So wide that scores differ, and mixed-up scores are noticed; of wider layers the sums would saturate.
    spread = {"initializer_range": 1 / size["hidden_size"] ** 0.5}
    return {"vocab_size": len(tokenizer), "num_labels": 1, **ids, **spread, **size}


def _size(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_size": 768,
}
#: name -> what saves a model of that shape in a folder
ARCHITECTURES: dict[str, Callable[[Path, Any], str]] = {
    "minilm-l6": partial(classifier, family="bert", **_size(384, 1536, 6, 12)),
    "ettin-17m": partial(ettin, **_size(256, 384, 7, 4)),
    "modernbert-base": partial(classifier, family="modernbert", **_size(768, 1152, 22, 12)),
    "deberta-v3-base": partial(classifier, family="deberta-v2", **_size(768, 3072, 12, 12), **DEBERTA),
    "xlm-r-large": partial(
        classifier,
        family="xlm-roberta",
        **_size(1024, 4096, 24, 16),
        max_position_embeddings=514,
        type_vocab_size=2,  # of the built-in tokenizer; XLM-R itself has one
    ),
    "qwen3-0.6b": partial(logit_score, **_size(1024, 3072, 28, 16), **QWEN3),
}
