"""The way from texts to scores that ``CrossEncoder.predict`` takes, without what it does anew for every batch.

``predict`` tokenizes a batch and pads it at once, so whoever wants to put pairs of like lengths together first has to
guess their lengths, or to tokenize twice. Here a slice is tokenized once; what goes into the network, and what becomes
of what comes out, is ``predict``'s own, and proved to be: by what the network is called with for texts of every kind,
and by scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import CrossEncoder
from transformers.modeling_outputs import SequenceClassifierOutput

from mp_rerank._engine.calls import Pairs, record_calls
from mp_rerank._pairs import CANARY

__all__ = ["Direct", "Tokenized", "find_direct"]

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
#: batches whose tokens must be those that ``predict`` makes; longest first, as some versions sort them
PROBES: list[Pairs] = [
    CANARY[::-1],
    [("", "")],
    [("  spaces ", "\ttabs\nand lines\u00a0")],
    [("Wie viele Menschen leben in 東京?", "Население Токио — 14 миллионов 🙂 n\u0303 \u200b")],
    [("<s> [CLS] [SEP] </s>", "[MASK] <mask> <|endoftext|>")],
]


@dataclass(frozen=True)
class Tokenized:
    """Pairs as rows of tokens, unpadded, under the names that the network takes them by."""

    rows: dict[str, list[list[int]]]
    lengths: list[int]


class Direct:
    """Scores with the tokenizer, the network and the activation of ``model``, a ``CrossEncoder``."""

    def __init__(self, model: Any) -> None:
        self._tokenizer = model.tokenizer
        self._network = model.model
        self._activation = model.activation_fn
        self._constants: dict[str, Any] = {}
        self._padding = {
            "input_ids": self._tokenizer.pad_token_id,
            "token_type_ids": self._tokenizer.pad_token_type_id,
            "attention_mask": 0,
        }

    def tokenize(self, pairs: Pairs) -> Tokenized:
        """``pairs`` as tokens, truncated."""
        queries, documents = zip(*pairs, strict=True)
        encoding = self._tokenizer(list(queries), list(documents), truncation=True)
        rows = {name: encoding[name] for name in encoding}
        return Tokenized(rows, [len(row) for row in rows["input_ids"]])

    def score(self, tokenized: Tokenized, batch: Sequence[int]) -> npt.NDArray[np.float32]:
        """Scores of the pairs at ``batch``, in one forward pass: shape (n,) or (n, num_labels)."""
        with torch.inference_mode():
            logits = self._network(**self._features(tokenized, batch), **self._constants).logits
            scores = self._activation(logits.float())
            found: npt.NDArray[np.float32] = (scores[:, 0] if scores.shape[1] == 1 else scores).float().cpu().numpy()
        return found

    def prove(self, predict: Callable[[Pairs], npt.NDArray[np.float32]], max_length: int | None) -> None:
        """Raise ``ValueError`` unless this is what ``predict`` does, which scores one batch with the same model."""
        overlong = [] if max_length is None else [[("long", "long " * max_length)], [("long " * max_length, "long")]]
        for batch in (*PROBES, *overlong):
            calls = record_calls(self._network, predict, batch, self._no_answer)
            if len(calls) != 1:
                raise ValueError(f"predict calls the network {len(calls)} times for one batch")
            tensors = {name: value for name, value in calls[0].items() if isinstance(value, torch.Tensor)}
            self._constants = {name: value for name, value in calls[0].items() if name not in tensors}
            features = self._features(self.tokenize(batch), range(len(batch)))
            if features.keys() != tensors.keys():
                raise ValueError(f"predict calls the network with {sorted(tensors)}, not with {sorted(features)}")
            for name, tensor in features.items():
                if not torch.equal(tensor, tensors[name]):
                    raise ValueError(f"predict makes other {name} of {str(batch)[:80]}")
        expected, found = predict(CANARY), self.score(self.tokenize(CANARY), range(len(CANARY)))
        if expected.shape != found.shape or not np.allclose(expected, found, rtol=TOLERANCE, atol=TOLERANCE):
            raise ValueError(f"predict scores {expected}, not {found}")

    def _features(self, tokenized: Tokenized, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the network takes: tensors of shape (pairs, longest)."""
        longest = max(tokenized.lengths[i] for i in batch)
        features = {}
        for name, rows in tokenized.rows.items():
            padded = np.full((len(batch), longest), self._padding[name], dtype=np.int64)
            for line, i in zip(padded, batch, strict=True):
                length = tokenized.lengths[i]
                line[slice(length) if self._tokenizer.padding_side == "right" else slice(longest - length, None)] = (
                    rows[i]
                )
            features[name] = torch.from_numpy(padded).to(self._network.device)
        return features

    def _no_answer(self, **arguments: Any) -> SequenceClassifierOutput:
        shape = len(arguments["input_ids"]), self._network.config.num_labels
        return SequenceClassifierOutput(logits=torch.zeros(shape, device=self._network.device))


def find_direct(
    model: Any, predict: Callable[[Pairs], npt.NDArray[np.float32]], max_length: int | None
) -> Direct | None:
    """The direct way for ``model``, or ``None`` where there is none that does the same as ``predict``.

    Args:
        model: a ``CrossEncoder``, at rest.
        predict: scores one batch with it.
        max_length: tokens it truncates a pair to, if it does.
    """
    if type(model) is not CrossEncoder or "predict" in vars(model):  # a loader's, with a predict of its own
        return None
    if not isinstance(model, torch.nn.Module):  # before sentence-transformers 4
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    try:
        direct = Direct(model)
        direct.prove(predict, max_length)
    except Exception as error:  # one of many things: another kind of head, a prompt, a processor, an older version
        logger.debug("%s scores by predict only: %s", type(model).__name__, error)
        return None
    return direct
