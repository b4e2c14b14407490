"""Models of a given shape with random weights, and requests of random words: speed does not depend on their values."""

from __future__ import annotations

import random

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from mp_rerank.config import BUILTIN_FOLDER

__all__ = ["SHAPES", "Pairs", "make_model", "make_requests"]

Pairs = list[tuple[str, str]]
SHAPES = {
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    # As XLM-RoBERTa-large and bge-reranker-v2-m3: half of it are the embeddings of 250,002 tokens.
    "xlm-r-large": {
        "vocab_size": 250_002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


def make_model(folder: str, shape: dict[str, int]) -> None:
    """Save a model of ``shape`` with random weights, and the built-in model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_FOLDER)
    torch.manual_seed(0)
    # A wider spread than BERT's 0.02, so that scores differ and mixed-up scores are noticed. Wider layers get a
    # narrower one: their larger sums would saturate.
    model = BertForSequenceClassification(
        BertConfig(
            **{"vocab_size": len(tokenizer), **shape}, num_labels=1, initializer_range=2 / shape["hidden_size"] ** 0.5
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_requests(agents: int, documents: int, words: int) -> list[Pairs]:
    """A request for each agent: a query and documents of random words, about ``words`` in each document."""
    chance = random.Random(0)
    vocabulary = [w for w in AutoTokenizer.from_pretrained(BUILTIN_FOLDER).get_vocab() if w.isalpha() and len(w) > 2]
    vocabulary.sort()

    def text(length: float) -> str:
        return " ".join(chance.choices(vocabulary, k=max(3, int(length))))

    return [
        [(query, text(chance.gauss(words, words / 3))) for _ in range(documents)]
        for query in (text(8) for _ in range(agents))
    ]
