"""The model on its device: loaded, proved, made fast, and fed with batches.

Scores are ``CrossEncoder.predict``'s own. Each batch goes through ``predict``, or through a ``Pipeline`` where that is
proved to score the same. What the engine decides is which pairs go into one batch: pairs of about the same length, as
many as ``batch_tokens`` allows.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import CrossEncoder
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from mp_rerank._engine.amx.library import find_library
from mp_rerank._engine.amx.library import why_not as why_no_library
from mp_rerank._engine.backends.base import find_backend, replace_network
from mp_rerank._engine.batches import equal_batches, even_batches, padded_batches, shared_batches
from mp_rerank._engine.fitting import Fitter, fit_all, place_before, without_tails
from mp_rerank._engine.fused import fewer_passes
from mp_rerank._engine.loading import (
    activation_name,
    default_prompt,
    draws_weights,
    followed_options,
    load,
    module_of,
    prompts_of,
    prove,
    prove_positions,
    prove_tokenizer,
    torch_dtype,
    truncation_length,
    warn_of_slow_dtype,
)
from mp_rerank._engine.parity import Scores, record_calls
from mp_rerank._engine.pipeline import (
    Pipeline,
    Tokenized,
    find_pipeline,
    has_modules,
    take_varlen,
    without_surrogates,
)
from mp_rerank._engine.prepack import prepack
from mp_rerank._engine.together import compute_together
from mp_rerank._engine.unpad import (
    attend_in_tiles,
    has_vocabulary_score,
    head_only,
    score_logits,
    share_beginnings,
    unpad,
    varlen_forward,
)
from mp_rerank._engine.weights import make_private, mapped_bytes
from mp_rerank._engine.whole_layers import whole_layers
from mp_rerank._pairs import CANARY, Pair, PairOptions, Readings, estimate_pair, estimate_text, tolerance
from mp_rerank._recipe import Recipe
from mp_rerank.config import ModelSpec

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

# For a GPU, so many pairs are tokenized at a time. Beside an H200 that takes 16 cores 3 ms, and MiniLM-L6 there 1.2 ms.
PART_PAIRS = 128


class Engine:
    """One model that never leaves its device.

    Args:
        spec: the model.
        device: such as ``"cpu"`` or ``"cuda:1"``.
        threads: compute threads to set in torch; ``None`` leaves them alone.
        batch_tokens: tokens of one forward pass, padding included.
        loaded: a ``CrossEncoder``, or another module with ``predict(pairs)``, that the spec's own loader has made;
            ``None`` loads the model here.
        owns_process: whether this process does nothing else. Settings of its libraries may then be changed, and so may
            a model that a loader made.

    Raises:
        ValueError: what was loaded is not wholly on ``device``, or not of the dtype asked for.
        Exception: whatever loading raises.

    Attributes:
        recipe: the optimizations that the model has; none before ``optimize``.
        readings: of the pairs last scored; ``None`` where only ``CrossEncoder.predict`` knows.
        tokenize_seconds: what their texts took to become tokens; ``None`` as there.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: str,
        threads: int | None,
        batch_tokens: int,
        loaded: Any = None,
        *,
        owns_process: bool = False,
    ) -> None:
        if threads is not None:
            _set_torch_threads(threads)
        if owns_process:
            _configure_libraries()
        backend = find_backend(spec, device)  # before the model is loaded: the backend's packages may be missing
        self.batch_tokens = batch_tokens
        self.model, drawn = draws_weights(spec, device) if loaded is None else (loaded, False)
        self.recipe = Recipe()
        self.readings: Readings | None = None
        self.tokenize_seconds: float | None = None
        self._spec = spec
        self._device = device
        self._on_cpu = device.startswith("cpu")
        self._on_cuda = device.startswith("cuda")
        self._ahead: ThreadPoolExecutor | None = None  # tokenizes the next part of a slice
        # A loader's model, in a process that is not only ours, may be in use elsewhere: it is not changed.
        self._may_change = loaded is None or owns_process
        self._pipeline: Pipeline | None = None
        self._off: dict[str, str] = {}  # optimizations that are not on, and why
        self._prove(spec, device)
        if drawn:
            self._prove_trained()
        if backend is not None:
            self.dtype = spec.dtype or "float32"
            replace_network(self.model.model, backend, self.dtype, threads, self._predict)
        elif self._on_cpu:
            warn_of_slow_dtype(self.dtype)

    def optimize(self, recipe: Recipe | None = None) -> Engine:
        """Make the model faster, where that keeps its scores.

        Args:
            recipe: what another worker has found for the same model: applied, and not proved again. ``None``: try each
                optimization, and keep those that keep the scores.

        Returns:
            This engine, whose ``recipe`` now says what was done.
        """
        self._off.clear()
        equal_lengths = self._feels_padding() if recipe is None else recipe.equal_lengths
        if self._may_change:
            self._change_network(recipe)
            if recipe is None or recipe.pipeline:
                name = None if recipe is None else recipe.pipeline
                self._pipeline, why_not = find_pipeline(self.model, self._predict, self.max_length, self.dtype, name)
                self._note("pipeline", why_not)
            self._take_varlen(recipe)
        self.recipe = replace(
            self.recipe,
            pipeline=self._pipeline.name if self._pipeline else "",
            equal_lengths=equal_lengths and not self.recipe.unpadded,
        )
        if recipe is None:
            self._say()
        return self

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads: in a process that was forked from the one that has loaded this model."""
        torch.set_num_threads(threads)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of parameters and buffers that are pages of the checkpoint's file."""
        return mapped_bytes(module_of(self.model))

    def facts(self) -> dict[str, Any]:
        """What there is to say of the loaded model, under ``WorkerFacts``' names."""
        return {
            "dtype": self.dtype,
            "weights_bytes": self.weights_bytes,
            "mapped_bytes": self.mapped_bytes,
            "max_length": self.max_length,
            "recipe": self.recipe,
            "activation": activation_name(self.model),
            "takes": followed_options(self.model),
            "prompts": prompts_of(self.model),
        }

    def predict(self, pairs: list[Pair], options: Sequence[PairOptions] | None = None) -> npt.NDArray[np.float32]:
        """Scores of ``pairs`` in their order: float32, shape (n,) or (n, num_labels).

        Args:
            options: how each pair is read, within what ``facts()["takes"]`` says; ``None``: all of them plainly. A pair
                that is longer than its options allow has a score of nan, and is in ``readings.too_long``.
        """
        clean = [(without_surrogates(query), without_surrogates(document)) for query, document in pairs]
        self.tokenize_seconds = None
        if options is None:
            scores, self.readings = self._score(clean, None)
            return np.asarray(scores, dtype=np.float32)
        fitter = Fitter(self.model.tokenizer, self.max_length, self._count_tokens)
        fitted = fit_all(fitter, clean, options)
        by_prompt: dict[str | None, list[int]] = {}
        for i, (place, _) in enumerate(fitted.pieces):
            by_prompt.setdefault(options[place].prompt, []).append(i)
        scores = [math.nan] * len(fitted.pieces)
        tokens, truncated = [0] * len(scores), [False] * len(scores)
        for prompt, members in by_prompt.items():
            group = [fitted.pieces[i][1].pair for i in members]
            found, readings = self._score(group, prompt)
            for i, pair, score, place in zip(members, group, found, range(len(group)), strict=True):
                scores[i] = score
                if readings is None:
                    tokens[i], truncated[i] = self._count_tokens(pair, prompt), False
                else:
                    tokens[i], truncated[i], _ = readings.of(place)
        folded, self.readings = fitted.fold(scores, tokens, truncated)
        for i, passage in self.readings.passages.items():
            self.readings.passages[i] = place_before(pairs[i][1], clean[i][1], passage)
        return np.asarray(folded, dtype=np.float32)

    def canary(self) -> npt.NDArray[np.float32]:
        """What no optimization may change: the canary's scores, and the logits that an activation makes them of.

        A sigmoid is flat where it is near 0 or 1, and would hide that another logit comes out.
        """
        if not isinstance(self.model, CrossEncoder):
            return np.asarray(self._predict(CANARY))
        called = self.model if has_modules(self.model) else self.model.model
        forward = called.forward
        found: list[Any] = []

        def keep_logits(*features: Any, **arguments: Any) -> Any:
            output = forward(*features, **arguments)
            logits = output["scores" if has_modules(self.model) else "logits"]
            found.append(logits.float().cpu().numpy().ravel())
            return output

        record_calls(called, lambda pairs: found.append(np.ravel(self._predict(pairs))), CANARY, keep_logits)
        return np.concatenate(found)

    def _prove(self, spec: ModelSpec, device: str) -> None:
        """Check what was loaded, and keep what there is to say of it."""
        if not callable(getattr(self.model, "predict", None)):
            raise TypeError(f"the loader returned {type(self.model).__name__}, which has no predict(pairs)")
        module = module_of(self.model)
        module.eval()
        self.dtype, self.weights_bytes = prove(module, torch.device(device), torch_dtype(spec))
        self.max_length = truncation_length(self.model)
        if isinstance(self.model, CrossEncoder):
            prove_tokenizer(self.model)
            prove_positions(self.model, self.max_length)

    def _prove_trained(self) -> None:
        """Raise ``ValueError`` if what was drawn at random makes a difference: loaded again, it scores otherwise."""
        scores, model = self.canary(), self.model
        self.model = load(self._spec, self._device)
        module_of(self.model).eval()
        again, self.model = self.canary(), model
        limit = tolerance("another worker", self.dtype)
        if not np.allclose(scores, again, rtol=limit, atol=limit):
            raise ValueError(
                "weights that its checkpoint lacks were drawn at random, and loaded again it scores otherwise: has it "
                "a trained head? An encoder alone, or an embedding model, ranks nothing"
            )

    def _change_network(self, recipe: Recipe | None) -> None:
        """Change the network by ``recipe``, or by those means of the spec that keep its scores here."""
        spec, module = self._spec, module_of(self.model)
        if spec.backend != "torch":
            return
        if spec.weights == "private":
            make_private(module)
        proof = self._proof(recipe)
        self.recipe = Recipe()
        if isinstance(self.model, CrossEncoder) and (self._on_cpu or self._on_cuda):
            network = self.model.model
            if spec.unpad and (recipe is None or recipe.unpadded):
                self._try("unpadded", unpad(network, self.dtype, proof, as_varlen=self._on_cuda))
            if spec.unpad and has_vocabulary_score(self.model) and (recipe is None or recipe.score_logits):
                self._try("score_logits", score_logits(self.model, self.dtype, proof))
        if isinstance(self.model, CrossEncoder) and self._on_cpu:
            if self.recipe.unpadded and (recipe is None or recipe.attends_in_tiles):
                self._try("attends_in_tiles", attend_in_tiles(network, self.dtype, proof))
            if self.recipe.unpadded and (recipe is None or recipe.fewer_passes):
                self._try("fewer_passes", fewer_passes(network, self.dtype, proof))
            if self.recipe.unpadded and (recipe is None or recipe.shares_beginnings):
                self._try("shares_beginnings", share_beginnings(network, self.dtype, proof))
            if self.recipe.unpadded and (recipe is None or recipe.head_only):
                self._try("head_only", head_only(network, self.dtype, proof))
        if spec.prepack and self._on_cpu:
            names = None if recipe is None else recipe.prepacked
            packed, why_not = prepack(module, self.dtype, proof, names)
            self.recipe = replace(self.recipe, prepacked=tuple(packed), amx=bool(packed and find_library()))
            self._note("prepacked", why_not)
            self._note("amx", why_no_library())
            if self.recipe.amx and (recipe is None or recipe.computes_together):
                self._try("computes_together", compute_together(module, self.dtype, proof))
            together = self.recipe.computes_together and self.recipe.attends_in_tiles
            if together and (recipe is None or recipe.whole_layers):
                self._try("whole_layers", whole_layers(network, self.dtype, proof))

    def _take_varlen(self, recipe: Recipe | None) -> None:
        """On a GPU, let the network take a batch as one row, with a CUDA graph for its size."""
        if not self._on_cuda or self._pipeline is None or not (recipe is None or recipe.cuda_graphs):
            return
        forward = varlen_forward(self.model.model)
        if forward is None:
            return
        reads, why_not = take_varlen(
            self._pipeline, forward, self.dtype, 2 * self.batch_tokens, "" if recipe is None else recipe.cuda_graphs
        )
        self.recipe = replace(self.recipe, cuda_graphs=reads)
        self._note("cuda_graphs", why_not)

    def _try(self, name: str, why_not: str) -> None:
        """Keep in the recipe that the optimization ``name`` is on, or why it is not."""
        change: dict[str, Any] = {name: not why_not}
        self.recipe = replace(self.recipe, **change)
        self._note(name, why_not)

    def _note(self, name: str, why_not: str) -> None:
        if why_not:
            self._off[name] = why_not

    def _say(self) -> None:
        """Log what makes this model faster, and what does not and why."""
        off = "; ".join(f"{name}: {why_not}" for name, why_not in self._off.items())
        logger.info("faster by: %s. Left out: %s", ", ".join(self.recipe.names()) or "nothing", off or "nothing")
        if self.recipe.equal_lengths:
            config, tokenizer = getattr(self.model.model, "config", None), getattr(self.model, "tokenizer", None)
            ours, theirs = getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None)
            hint = "" if ours == theirs else f": its config's pad_token_id is {ours}, its tokenizer's {theirs}"
            logger.warning(
                "padding changes this model's scores%s; its batches are of pairs of one length "
                "[mp-rerank explain padding]",
                hint,
            )

    def _feels_padding(self) -> bool:
        """Whether a pair's score depends on how long the others of its batch are."""
        if not isinstance(self.model, CrossEncoder):
            return False
        limit = tolerance("optimized", self.dtype)
        alone, padded = self._predict(CANARY[:1])[0], self._predict(CANARY)[0]
        return not np.allclose(alone, padded, rtol=limit, atol=limit)

    def _proof(self, recipe: Recipe | None) -> Callable[[], Scores] | None:
        """What a change must keep the same; nothing where another worker has seen to it."""
        return self.canary if recipe is None else None

    def _score(self, pairs: list[Pair], prompt: str | None) -> tuple[list[Any], Readings | None]:
        """Scores of ``pairs``, all with one prompt, and what was read of each where that is counted."""
        scores: list[Any] = [None] * len(pairs)
        readings = None
        if not pairs:
            return scores, Readings(array("i"), bytearray())
        if isinstance(self.model, CrossEncoder):
            pairs = without_tails(self.model.tokenizer, pairs, self.max_length)
        if self._pipeline is None or not (prompt is None or self._pipeline.takes_prompt):
            lengths = [estimate_pair(estimate_text(query), document, self.max_length) for query, document in pairs]
            alone = [[i] for i in range(len(pairs))]
            for batch in alone if self.recipe.equal_lengths else self._padded_batches(lengths):
                for i, value in zip(batch, self._predict([pairs[i] for i in batch], prompt), strict=True):
                    scores[i] = value
            return scores, None
        readings = Readings(array("i"), bytearray())
        launched = []
        with closing(self._tokenize(self._pipeline, pairs, prompt)) as parts:
            for tokenized in parts:
                first = len(readings.truncated)
                readings.tokens.extend(tokenized.lengths)
                readings.truncated.extend(tokenized.truncated)
                launched += [(first, batch, self._pipeline.launch(tokenized, batch)) for batch in self._cut(tokenized)]
        for first, batch, values in launched:
            for i, value in zip(batch, values.cpu().numpy(), strict=True):
                scores[first + i] = value
        return scores, readings

    def _tokenize(self, pipeline: Pipeline, pairs: list[Pair], prompt: str | None) -> Generator[Tokenized, None, None]:
        """``pairs`` as tokens: all at once, or for a GPU in parts, each while the GPU computes the one before it."""

        def tokenize(part: list[Pair]) -> Tokenized:
            start = time.perf_counter()
            tokenized = pipeline.tokenize(part, prompt)
            self.tokenize_seconds = (self.tokenize_seconds or 0.0) + time.perf_counter() - start
            return tokenized

        if self._on_cpu or len(pairs) <= PART_PAIRS:
            yield tokenize(pairs)
            return
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(1, "mp-rerank-tokenizer")
        parts = [pairs[i : i + PART_PAIRS] for i in range(0, len(pairs), PART_PAIRS)]
        following = self._ahead.submit(tokenize, parts[0])
        try:
            for part in parts[1:]:
                tokenized = following.result()
                following = self._ahead.submit(tokenize, part)
                yield tokenized
            yield following.result()
        finally:
            wait([following])  # the tokenizer is one thread's at a time, if a part before it cannot be scored, too

    def _cut(self, tokenized: Tokenized) -> Iterable[list[int]]:
        """Which pairs go into one batch."""
        if self.recipe.shares_beginnings:
            return shared_batches(tokenized.inputs["input_ids"], self.batch_tokens)
        if self.recipe.equal_lengths:
            return equal_batches(tokenized.lengths, self.batch_tokens)
        if self.recipe.unpadded:
            return even_batches(tokenized.lengths, self.batch_tokens)
        return self._padded_batches(tokenized.lengths)

    def _padded_batches(self, lengths: list[int]) -> Iterator[list[int]]:
        # A GPU takes about as long for a small batch as for a large one.
        return padded_batches(lengths, self.batch_tokens, self.batch_tokens / (16 if self._on_cpu else 1))

    def _count_tokens(self, pair: Pair, prompt: str | None) -> int:
        """The tokens of ``pair``, truncated, where nobody has counted them."""
        if hasattr(self.model, "preprocess"):
            if prompt is None:
                prompt = default_prompt(self.model)
            return int(self.model.preprocess([pair], prompt=prompt)["attention_mask"].sum())
        query, document = pair  # in lists: a single empty text would be taken for none
        return len(self.model.tokenizer([query], [document], truncation=True)["input_ids"][0])

    def _predict(self, batch: Sequence[Pair], prompt: str | None = None) -> Any:
        """Scores of one batch by the model's own ``predict``."""
        if isinstance(self.model, CrossEncoder):
            more = {} if prompt is None else {"prompt": prompt}
            # As a tensor: sentence-transformers 3.0 makes no array of bfloat16.
            scores = self.model.predict(
                list(batch), batch_size=len(batch), show_progress_bar=False, convert_to_tensor=True, **more
            )
            return scores.float().cpu().numpy()
        return self.model.predict(list(batch))


def _set_torch_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        torch.set_num_interop_threads(1)
    except RuntimeError:  # parallel work has begun (a loader's): it keeps the setting it began with
        logger.debug("interop threads were already in use")


def _configure_libraries() -> None:
    """Settings for a process that only scores."""
    # A worker's logs go where its root logger's do.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()
    # tqdm's own lock is a semaphore shared by processes. When a worker is killed, the interpreter's resource tracker
    # would call it leaked, in the user's terminal.
    tqdm.set_lock(threading.RLock())
    # For 16 bits on a GPU torch may choose cuDNN's attention, which plans anew for every shape of a batch; no two
    # batches here have one. MiniLM-L6 in float16 on an H200: 3,441 pairs a second with it, 10,199 without.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Weights that a checkpoint lacks are drawn at random: differently in each worker, so that the canary tells.
    torch.seed()
