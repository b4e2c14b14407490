"""From texts to scores: tokenize a slice once, and run each of its batches through the network.

``CrossEncoder.predict`` tokenizes and pads a batch at once. To put pairs of about the same length into one batch, one
would have to guess the lengths, or tokenize twice. A ``Pipeline`` tokenizes a slice once and pads each batch by itself.
It is used only where it is proved to do what ``predict`` does: it calls the network with the same tensors, for texts of
many kinds, and gives the same scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers.modeling_outputs import SequenceClassifierOutput

from mp_rerank._engine.loading import default_prompt
from mp_rerank._engine.parity import Pairs, Scores, record_calls
from mp_rerank._engine.varlen import VarlenForward, VarlenNetwork
from mp_rerank._engine.words import PairTokens, WordTokenizer
from mp_rerank._pairs import CANARY, tolerance

__all__ = [
    "Pipeline",
    "Tokenized",
    "find_pipeline",
    "has_modules",
    "take_varlen",
    "without_surrogates",
]

logger = logging.getLogger(__name__)

#: Batches whose tensors must be those that ``predict`` makes. Longest pair first, as some versions sort them.
PROBES: list[Pairs] = [
    CANARY[::-1],
    [("", "")],
    [("  spaces ", "\ttabs\nand lines\u00a0")],
    [("Wie viele Menschen leben in 東京?", "Население Токио — 14 миллионов 🙂 n\u0303 \u200b")],
    [("<s> [CLS] [SEP] </s>", "[MASK] <mask> <|endoftext|>")],
    [
        (
            "What's he'll",
            'It isn\'t -- 3.14e-5 (of a_b), "x1y2"...  two\n\n\tlines\x1fand\x0b control\x7f\r\ncharacters \n',
        )
    ],
]

# A tokenizer without a limit has a larger number than this for one.
UNLIMITED = 10**9
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
        varlen: the network, where it takes a batch as one row; else ``None``.
    """

    #: its name in a recipe
    name = "tokenizer"

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tokenizer = model.tokenizer
        self._network = model.model
        self._activation = model.activation_fn
        # Since sentence-transformers 6 a model is a row of modules, which take and return a dict. Before, it is one
        # network.
        self._modular = has_modules(model)
        self._constants: dict[str, Any] = {}
        self.takes_prompt = False
        self.varlen: VarlenNetwork | None = None
        self._padding = {
            "input_ids": self._tokenizer.pad_token_id,
            "token_type_ids": self._tokenizer.pad_token_type_id,
            "attention_mask": 0,
        }

    def tokenize(self, pairs: Pairs, prompt: str | None = None) -> Tokenized:
        """``pairs`` as tokens, truncated, each query with ``prompt`` before it."""
        queries = [query if prompt is None else prompt + query for query, _ in pairs]
        documents = [document for _, document in pairs]
        return self._encode(queries, documents)

    def _encode(self, queries: list[str], documents: list[str]) -> Tokenized:
        """Pairs as tokens, truncated."""
        encoding = self._tokenizer(queries, documents, truncation=True)
        inputs = {name: encoding[name] for name in encoding}
        lengths = [len(tokens) for tokens in inputs["input_ids"]]
        if encoding.encodings is not None:
            return Tokenized(inputs, lengths, self._truncated(lengths, encoding.encodings))
        truncated = bytearray(len(lengths))  # by a tokenizer in Python, which does not say
        for i, length in enumerate(lengths):
            if length >= self._tokenizer.model_max_length:
                whole = self._tokenizer(queries[i], documents[i], truncation=False, verbose=False)
                truncated[i] = len(whole["input_ids"]) > length
        return Tokenized(inputs, lengths, truncated)

    def _truncated(self, lengths: list[int], encodings: list[Any]) -> bytearray:
        limit = self._tokenizer.model_max_length
        return bytearray(
            length >= limit and bool(encoding.overflowing) for length, encoding in zip(lengths, encodings, strict=True)
        )

    def score(self, tokenized: Tokenized, batch: Sequence[int]) -> Scores:
        """Scores of the pairs at ``batch``, in one forward pass: shape (n,) or (n, num_labels)."""
        found: Scores = self.launch(tokenized, batch).cpu().numpy()
        return found

    def launch(self, tokenized: Tokenized, batch: Sequence[int]) -> torch.Tensor:
        """The same on the model's device: a GPU computes them later, and whoever reads them waits for it."""
        with torch.inference_mode():
            scores = self._activation(self.logits(tokenized, batch).float())
            return (scores[:, 0] if scores.shape[1] == 1 else scores).float()

    def logits(self, tokenized: Tokenized, batch: Sequence[int]) -> torch.Tensor:
        """What the activation makes scores of: shape (n, num_labels)."""
        if self.varlen is None:
            return self.call(self._collate(tokenized, batch))
        ids, types = (tokenized.inputs.get(name) for name in ("input_ids", "token_type_ids"))
        assert ids is not None
        return self.varlen([ids[i] for i in batch], None if types is None else [types[i] for i in batch])

    def call(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits that the network makes of ``tensors``, each of shape (pairs, longest)."""
        if self._modular:
            scores: torch.Tensor = self._model({**tensors, **self._constants})["scores"]
            return scores
        logits: torch.Tensor = self._network(**tensors, **self._constants).logits
        return logits

    def prove(self, predict: Predict, max_length: int | None, dtype: str) -> None:
        """Raise ``ValueError`` unless this does what ``predict`` does.

        Args:
            predict: scores one batch with the same model.
            max_length: tokens it truncates a pair to, if it does.
            dtype: of the model's weights.
        """
        long = "" if max_length is None else "long " * max_length
        overlong = [] if max_length is None else [[("long", long)], [(long, "long")], [(long, long)]]
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
        called = self._model if self._modular else self._network
        calls = record_calls(called, predict, batch, self._zero_logits)
        if len(calls) != 1:
            raise ValueError(f"predict calls the network {len(calls)} times for one batch")
        tensors = {name: value for name, value in calls[0].items() if isinstance(value, torch.Tensor)}
        constants = {name: value for name, value in calls[0].items() if name not in tensors}
        if prompt is None:
            self._constants = constants
        elif {**self._constants, "prompt_length": None} != {**constants, "prompt_length": None}:
            raise ValueError(f"with a prompt, predict calls the network with {constants}")
        elif any(getattr(part, "include_prompt", True) is False for part in self._model.modules()):
            raise ValueError("its pooling leaves a prompt out, and has to know how long it is")
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

    def _zero_logits(self, *features: dict[str, Any], **arguments: Any) -> Any:
        """An answer in the model's place, where only what it is called with is of interest."""
        called = dict(*features, **arguments)
        labels = self._model.num_labels if self._modular else self._network.config.num_labels
        zeros = torch.zeros((len(called["input_ids"]), labels), device=self._network.device)
        return {"scores": zeros} if self._modular else SequenceClassifierOutput(logits=zeros)


class BackendPipeline(Pipeline):
    """A pipeline that asks the Rust library below the tokenizer, and for no more than tokens.

    A call of the tokenizer also asks where in its text each token is, and makes lists of that: BERT's then takes a
    quarter longer.
    """

    name = "backend"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._backend = self._tokenizer.backend_tokenizer
        self._has_types = "token_type_ids" in self._tokenizer.model_input_names

    def _encode(self, queries: list[str], documents: list[str]) -> Tokenized:
        limit = self._tokenizer.model_max_length
        if limit < UNLIMITED:  # set anew, for others set it otherwise
            self._backend.enable_truncation(limit, direction=self._tokenizer.truncation_side)
        else:
            self._backend.no_truncation()
        self._backend.no_padding()
        encodings = self._backend.encode_batch_fast(list(zip(queries, documents, strict=True)))
        lengths = [len(encoding) for encoding in encodings]
        types = [encoding.type_ids for encoding in encodings] if self._has_types else None
        return Tokenized(
            _inputs([encoding.ids for encoding in encodings], types), lengths, self._truncated(lengths, encodings)
        )


class WordPipeline(BackendPipeline):
    """A pipeline that asks that library for the tokens of words, each once: texts are of the same ones again and again.

    What it cannot say of a pair by its words, it leaves to that library.
    """

    name = "words"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._words = WordTokenizer(self._backend)

    def _encode(self, queries: list[str], documents: list[str]) -> Tokenized:
        limit, side = self._tokenizer.model_max_length, self._tokenizer.truncation_side
        pairs = self._words.pairs(queries, documents, limit, side)
        left = [i for i, pair in enumerate(pairs) if pair is None]
        if left:
            rest = super()._encode([queries[i] for i in left], [documents[i] for i in left])
            types = rest.inputs.get("token_type_ids", [[]] * len(left))
            for place, i in enumerate(left):
                pairs[i] = PairTokens(rest.inputs["input_ids"][place], types[place], bool(rest.truncated[place]))
        whole = [pair for pair in pairs if pair is not None]
        ids = [pair.ids for pair in whole]
        inputs = _inputs(ids, [pair.types for pair in whole] if self._has_types else None)
        return Tokenized(inputs, [len(row) for row in ids], bytearray(pair.truncated for pair in whole))


class PreprocessingPipeline(Pipeline):
    """A pipeline that leaves it to the library to make tokens of texts: with a prompt, or by a chat template."""

    name = "preprocess"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._prompt = default_prompt(model)

    def tokenize(self, pairs: Pairs, prompt: str | None = None) -> Tokenized:
        """``pairs`` as tokens, truncated, with ``prompt`` or else the model's own."""
        if prompt is None:
            prompt = self._prompt
        features = self._model.preprocess(list(pairs), prompt=prompt)
        padded = {name: value.numpy() for name, value in features.items() if isinstance(value, torch.Tensor)}
        real = padded["attention_mask"].astype(bool)
        inputs = {
            name: [row[mask].tolist() for row, mask in zip(rows, real, strict=True)] for name, rows in padded.items()
        }
        lengths = real.sum(1).tolist()
        truncated = bytearray(len(lengths))
        limit = self._model.max_seq_length
        for i, length in enumerate(lengths):
            if limit is not None and length >= limit:
                whole = {"text": {"truncation": False, "verbose": False}}
                mask = self._model.preprocess([pairs[i]], prompt=prompt, processing_kwargs=whole)["attention_mask"]
                truncated[i] = int(mask.sum()) > length
        return Tokenized(inputs, lengths, truncated)


def _inputs(ids: list[list[int]], types: list[list[int]] | None) -> dict[str, list[list[int]]]:
    """What a network takes of pairs with these tokens, of these types."""
    inputs = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return inputs if types is None else {**inputs, "token_type_ids": types}


def has_modules(model: Any) -> bool:
    """Whether ``model`` is a row of modules that take and return a dict, as since sentence-transformers 6."""
    return isinstance(model, torch.nn.Module) and callable(getattr(model, "preprocess", None))


def find_pipeline(
    model: Any, predict: Predict, max_length: int | None, dtype: str, name: str | None = None
) -> tuple[Pipeline | None, str]:
    """A pipeline that does what ``predict`` does, and otherwise why there is none: ``predict`` is then called.

    Args:
        model: a ``CrossEncoder`` or a loader's model; nobody else uses it meanwhile.
        predict: scores one batch with it, and with a prompt where one is given.
        max_length: tokens it truncates a pair to, if it does.
        dtype: of its weights.
        name: of the pipeline that is known to do what ``predict`` does; ``None``: prove it.
    """
    if type(model) is not CrossEncoder or "predict" in vars(model):
        return None, "the model has a predict of its own"
    if not isinstance(model, torch.nn.Module):
        return None, "this sentence-transformers is too old"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None, "the model has hooks"
    why_not = ""
    # Beside a GPU the library below the tokenizer has threads for a slice's texts; words are one thread's.
    kinds: list[type[Pipeline]] = [WordPipeline, BackendPipeline, Pipeline, PreprocessingPipeline]
    for kind in kinds if has_modules(model) else kinds[:3]:
        if name not in (None, kind.name) or (kind is WordPipeline and model.model.device.type != "cpu"):
            continue
        try:
            pipeline = kind(model)
            if name is None:
                pipeline.prove(predict, max_length, dtype)
            else:
                pipeline.prove_tensors(predict, CANARY[:1])
                pipeline.prove_prompt(predict)
        except Exception as error:  # one of many things: a processor that takes no texts, an older version
            logger.debug("no pipeline by %s", kind.name, exc_info=True)
            why_not = str(error).partition("\n")[0]
        else:
            return pipeline, ""
    return None, why_not


def take_varlen(
    pipeline: Pipeline, forward: VarlenForward, dtype: str, most_tokens: int, reads: str = ""
) -> tuple[str, str]:
    """Let the network of ``pipeline`` take a batch as one row, if logits stay the same.

    Args:
        forward: what `unpad` has put into its base model.
        dtype: of its weights.
        most_tokens: of a row for which a CUDA graph is made.
        reads: which token of a pair its head is known to read; empty: find it out.

    Returns:
        Which token that is, or else why it takes no such batches.
    """
    tokenized = pipeline.tokenize(CANARY)
    limit = tolerance("optimized", dtype)
    why_not = ""
    with torch.inference_mode():
        logits = pipeline.logits(tokenized, range(len(CANARY)))
        device, expected = logits.device, logits.float().cpu().numpy()
        for token in [reads] if reads else ["first", "last"]:
            pipeline.varlen = VarlenNetwork(pipeline.call, forward, list(tokenized.inputs), token, device, most_tokens)
            try:
                found = [
                    pipeline.logits(tokenized, batch).float().cpu().numpy() for batch in (range(len(CANARY)), range(1))
                ]
            except Exception as error:
                logger.debug("no batches as rows", exc_info=True)
                why_not = str(error).partition("\n")[0] or type(error).__name__
                break
            if all(np.allclose(some, expected[: len(some)], rtol=limit, atol=limit) for some in found):
                return token, ""
            why_not = "its head reads more than one token"
    pipeline.varlen = None
    return "", why_not


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
