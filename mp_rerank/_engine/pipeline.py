"""From texts to scores: tokenize a slice once, cut it into batches, and run each through the network.

``CrossEncoder.predict`` tokenizes and pads a batch at once. To put pairs of about the same length into one batch, one
would have to guess the lengths, or tokenize twice. A ``Pipeline`` tokenizes a slice once and pads each batch by itself.
It is used only where it is proved to do what ``predict`` does: it calls the network with the same tensors, for texts of
many kinds, and gives the same scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers.modeling_outputs import SequenceClassifierOutput

from mp_rerank._engine.parity import Pairs, Scores, record_calls
from mp_rerank._pairs import CANARY, tolerance

__all__ = ["Pipeline", "Tokenized", "even_batches", "find_pipeline", "padded_batches", "without_surrogates"]

logger = logging.getLogger(__name__)

#: Batches whose tensors must be those that ``predict`` makes. Longest pair first, as some versions sort them.
PROBES: list[Pairs] = [
    CANARY[::-1],
    [("", "")],
    [("  spaces ", "\ttabs\nand lines\u00a0")],
    [("Wie viele Menschen leben in 東京?", "Население Токио — 14 миллионов 🙂 n\u0303 \u200b")],
    [("<s> [CLS] [SEP] </s>", "[MASK] <mask> <|endoftext|>")],
]


# What another prompt shows that this one does not is what the tokenizer makes of it, in either way.
PROMPT = "Judge by this: "
Predict = Callable[..., Scores]


@dataclass(frozen=True)
class Tokenized:
    """Pairs as lists of tokens, unpadded, under the names by which the network takes them; and which were cut off."""

    inputs: dict[str, list[list[int]]]
    lengths: list[int]
    truncated: bytearray


class Pipeline:
    """Scores with the tokenizer, the network and the activation of ``model``, a ``CrossEncoder``.

    Attributes:
        takes_prompt: whether it is proved to do what ``predict(prompt=...)`` does.
    """

    def __init__(self, model: Any) -> None:
        self._tokenizer = model.tokenizer
        self._network = model.model
        self._activation = model.activation_fn
        self._constants: dict[str, Any] = {}
        self.takes_prompt = False
        self._padding = {
            "input_ids": self._tokenizer.pad_token_id,
            "token_type_ids": self._tokenizer.pad_token_type_id,
            "attention_mask": 0,
        }

    def tokenize(self, pairs: Pairs, prompt: str | None = None) -> Tokenized:
        """``pairs`` as tokens, truncated, each query with ``prompt`` before it."""
        queries = [query if prompt is None else prompt + query for query, _ in pairs]
        documents = [document for _, document in pairs]
        encoding = self._tokenizer(queries, documents, truncation=True)
        inputs = {name: encoding[name] for name in encoding}
        lengths = [len(tokens) for tokens in inputs["input_ids"]]
        truncated = bytearray(len(lengths))
        limit = self._tokenizer.model_max_length
        for i, length in enumerate(lengths):
            if length >= limit:
                if encoding.encodings is not None:
                    truncated[i] = bool(encoding.encodings[i].overflowing)
                else:  # a tokenizer in Python
                    whole = self._tokenizer(queries[i], documents[i], truncation=False, verbose=False)
                    truncated[i] = len(whole["input_ids"]) > length
        return Tokenized(inputs, lengths, truncated)

    def score(self, tokenized: Tokenized, batch: Sequence[int]) -> Scores:
        """Scores of the pairs at ``batch``, in one forward pass: shape (n,) or (n, num_labels)."""
        with torch.inference_mode():
            logits = self._network(**self._collate(tokenized, batch), **self._constants).logits
            scores = self._activation(logits.float())
            found: Scores = (scores[:, 0] if scores.shape[1] == 1 else scores).float().cpu().numpy()
        return found

    def prove(self, predict: Predict, max_length: int | None, dtype: str) -> None:
        """Raise ``ValueError`` unless this does what ``predict`` does.

        Args:
            predict: scores one batch with the same model.
            max_length: tokens it truncates a pair to, if it does.
            dtype: of the model's weights.
        """
        overlong = [] if max_length is None else [[("long", "long " * max_length)], [("long " * max_length, "long")]]
        for batch in (*PROBES, *overlong):
            self.prove_tensors(predict, batch)
        expected, found = predict(CANARY), self.score(self.tokenize(CANARY), range(len(CANARY)))
        limit = tolerance("same network", dtype)
        if expected.shape != found.shape or not np.allclose(expected, found, rtol=limit, atol=limit):
            raise ValueError(f"predict scores {expected}, not {found}")
        self.prove_prompt(predict)

    def prove_prompt(self, predict: Predict) -> None:
        """See whether this does what ``predict`` does with a prompt, if that takes one."""
        try:
            self.prove_tensors(partial(predict, prompt=PROMPT), CANARY[::-1], PROMPT)
        except Exception as error:
            logger.debug("a prompt goes by predict only: %s", error)
        else:
            self.takes_prompt = True

    def prove_tensors(self, predict: Callable[[Pairs], Scores], batch: Pairs, prompt: str | None = None) -> None:
        """Raise ``ValueError`` unless ``predict`` calls the network with the tensors made here.

        What else ``predict`` gives to the network is kept, to be given to it in every call.
        """
        calls = record_calls(self._network, predict, batch, self._zero_logits)
        if len(calls) != 1:
            raise ValueError(f"predict calls the network {len(calls)} times for one batch")
        tensors = {name: value for name, value in calls[0].items() if isinstance(value, torch.Tensor)}
        self._constants = {name: value for name, value in calls[0].items() if name not in tensors}
        collated = self._collate(self.tokenize(batch, prompt), range(len(batch)))
        if collated.keys() != tensors.keys():
            raise ValueError(f"predict calls the network with {sorted(tensors)}, not with {sorted(collated)}")
        for name, tensor in collated.items():
            if not torch.equal(tensor, tensors[name]):
                raise ValueError(f"predict makes other {name} of {str(batch)[:80]}")

    def _collate(self, tokenized: Tokenized, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the network takes for the pairs at ``batch``: tensors of shape (pairs, longest)."""
        longest = max(tokenized.lengths[i] for i in batch)
        tensors = {}
        for name, inputs in tokenized.inputs.items():
            padded = np.full((len(batch), longest), self._padding[name], dtype=np.int64)
            for line, i in zip(padded, batch, strict=True):
                length = tokenized.lengths[i]
                line[slice(length) if self._tokenizer.padding_side == "right" else slice(longest - length, None)] = (
                    inputs[i]
                )
            tensors[name] = torch.from_numpy(padded).to(self._network.device)
        return tensors

    def _zero_logits(self, **arguments: Any) -> SequenceClassifierOutput:
        """An answer in the network's place, where only its arguments are of interest."""
        shape = len(arguments["input_ids"]), self._network.config.num_labels
        return SequenceClassifierOutput(logits=torch.zeros(shape, device=self._network.device))


def find_pipeline(
    model: Any, predict: Predict, max_length: int | None, dtype: str, *, prove: bool = True
) -> Pipeline | None:
    """A pipeline that does what ``predict`` does, or ``None`` where there is none: ``predict`` is then called.

    Args:
        model: a ``CrossEncoder`` or a loader's model; nobody else uses it meanwhile.
        predict: scores one batch with it, and with a prompt where one is given.
        max_length: tokens it truncates a pair to, if it does.
        dtype: of its weights.
        prove: whether it is not known yet that it does what ``predict`` does.
    """
    if type(model) is not CrossEncoder or "predict" in vars(model):  # a loader's, with a predict of its own
        return None
    if not isinstance(model, torch.nn.Module):  # before sentence-transformers 4
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    try:
        pipeline = Pipeline(model)
        if prove:
            pipeline.prove(predict, max_length, dtype)
        else:
            pipeline.prove_tensors(predict, CANARY[:1])
            pipeline.prove_prompt(predict)
    except Exception as error:  # one of many things: another kind of head, a prompt, a processor, an older version
        logger.debug("%s scores by predict only: %s", type(model).__name__, error)
        return None
    return pipeline


def without_surrogates(text: str) -> str:
    """``text`` as valid Unicode, which is all that tokenizers take.

    A Python string can hold surrogates: halves of a UTF-16 pair. JSON such as ``"\\ud83d"``, an emoji cut in two, makes
    one. Two halves in their order become the character that they stand for; any other surrogate becomes U+FFFD, as in
    other decoders of UTF-16 (Rust's ``from_utf16_lossy``, JavaScript's ``toWellFormed``).
    """
    if text.isascii():  # known to Python without a look at the text
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def padded_batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Cut pairs into batches, for a network that computes padding too.

    Args:
        lengths: tokens of each pair.
        budget: tokens of one batch, each pair padded to its longest; a longer pair is a batch of its own.

    Yields:
        Indices of ``lengths``, longest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, budget // lengths[order[start]])
        yield order[start : start + size]
        start += size


def even_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Cut pairs into batches of about equally many tokens, for a network that computes no padding.

    Args:
        lengths: tokens of each pair.
        budget: tokens that a batch comes as near to as it can.

    Returns:
        Indices of ``lengths``, longest first.
    """
    total = sum(lengths)
    count = max(1, round(total / budget))
    found: list[list[int]] = [[] for _ in range(count)]
    before = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        found[int((before + lengths[i] / 2) / total * count)].append(i)
        before += lengths[i]
    return [batch for batch in found if batch]
