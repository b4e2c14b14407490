"""The contenders of `bench throughput`: the pool, and other ways to use a cross-encoder from many threads.

A contender is a context manager. When it is entered it loads its models and returns a `Run`: a function that scores one
request of each agent and returns each request's scores. A contender that cannot run here raises `NotRun` with the
reason, which the report notes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import queue
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from sentence_transformers import CrossEncoder

from bench.inputs.models import Pairs
from mp_rerank import ModelSpec, RerankerPool
from mp_rerank._workers.child import THREAD_VARIABLES
from mp_rerank.config import BUILTIN_FOLDER

__all__ = ["BASELINE", "CONTENDERS", "OURS", "NotRun", "Run", "Setting"]

Score = Callable[[Pairs], np.ndarray]
Run = Callable[[list[Pairs]], list[np.ndarray]]

BASELINE = "one CrossEncoder, a lock"
OURS = "mp_rerank, float32"
# The share of the free memory that one model for each thread may take.
MEMORY_SHARE = 0.5


class NotRun(Exception):  # noqa: N818
    """A contender cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """What contenders are started with.

    Attributes:
        folder: the model.
        workers: processes of a pool, one a core.
        agents: threads that call.
        device: the models' device: ``"cpu"``, or a GPU that all processes share.
    """

    folder: str
    workers: int
    agents: int
    device: str = "cpu"

    def on_cpu_only(self) -> None:
        """Raise ``NotRun`` on another device."""
        if self.device != "cpu":
            raise NotRun("as installed, it computes on the CPU only")


Contender = Callable[[Setting], AbstractContextManager[Run]]


@contextmanager
def called_by_agents(agents: int, score: Score) -> Iterator[Run]:
    """A run with a thread for each agent, which submits its request and waits for the scores."""
    with ThreadPoolExecutor(agents) as threads:
        yield lambda requests: list(threads.map(score, requests))


@contextmanager
def locked(setting: Setting) -> Iterator[Run]:
    """One model behind a lock: correct, and one request at a time."""
    model = load_model(setting)
    lock = threading.Lock()

    def score(pairs: Pairs) -> np.ndarray:
        with lock:
            return predict(model, pairs)

    with called_by_agents(setting.agents, score) as run:
        yield run


@contextmanager
def one_each(setting: Setting) -> Iterator[Run]:
    """A model for each thread, loaded one after another."""
    first = load_model(setting)
    needed = setting.agents * sum(weight.nbytes for weight in first.parameters())
    free = MEMORY_SHARE * psutil.virtual_memory().available
    if needed > free:
        raise NotRun(f"{setting.agents} models are {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} to be had")
    models: queue.SimpleQueue[CrossEncoder] = queue.SimpleQueue()
    models.put(first)
    for _ in range(setting.agents - 1):
        models.put(load_model(setting))

    def score(pairs: Pairs) -> np.ndarray:
        model = models.get()
        try:
            return predict(model, pairs)
        finally:
            models.put(model)

    with called_by_agents(setting.agents, score) as run:
        yield run


@contextmanager
def all_at_once(setting: Setting) -> Iterator[Run]:
    """One call of `predict` with all agents' pairs: the library's best case, which separate agents cannot have."""
    model = load_model(setting)

    def run(requests: list[Pairs]) -> list[np.ndarray]:
        scores = predict(model, [pair for request in requests for pair in request])
        return np.split(scores, np.cumsum([len(request) for request in requests])[:-1])

    yield run


@contextmanager
def library_pool(setting: Setting) -> Iterator[Run]:
    """The library's pool with its defaults, behind a lock: without it, callers get each other's results."""
    model = load_model(setting)
    pool = model.start_multi_process_pool([setting.device] * setting.workers)
    lock = threading.Lock()

    def score(pairs: Pairs) -> np.ndarray:
        with lock:
            return predict(model, pairs, pool=pool)

    try:
        with called_by_agents(setting.agents, score) as run:
            yield run
    finally:
        model.stop_multi_process_pool(pool)


@contextmanager
def library_pool_tuned(setting: Setting) -> Iterator[Run]:
    """The library's pool with one thread a process, and with the chunk size and batch size that are fastest.

    They are chosen in the warm-up, by trials with the first of the requests that are then measured.
    """
    model = load_model(setting)
    with threads_of_children(1):
        pool = model.start_multi_process_pool([setting.device] * setting.workers)
    lock = threading.Lock()
    chosen: dict[str, int] = {}
    tuned_for: list[list[Pairs]] = []

    def score(pairs: Pairs) -> np.ndarray:
        with lock:
            return predict(model, pairs, pool=pool, **chosen)

    def tune(pairs: Pairs) -> None:
        shares = {max(1, -(-len(pairs) // (share * setting.workers))) for share in (1, 2, 4)}
        trials = [{"chunk_size": chunk, "batch_size": batch} for chunk in shares for batch in (8, 32)]
        seconds = []
        for trial in trials:
            start = time.perf_counter()
            predict(model, pairs, pool=pool, **trial)
            seconds.append(time.perf_counter() - start)
        chosen.update(trials[seconds.index(min(seconds))])

    try:
        with called_by_agents(setting.agents, score) as by_agents:

            def run(requests: list[Pairs]) -> list[np.ndarray]:
                if not tuned_for or tuned_for[0] is not requests:
                    predict(model, requests[0], pool=pool)
                    tune(requests[0])
                    tuned_for[:] = [requests]
                return by_agents(requests)

            yield run
    finally:
        model.stop_multi_process_pool(pool)


@contextmanager
def executor(setting: Setting) -> Iterator[Run]:
    """A `ProcessPoolExecutor` whose processes have each loaded the model."""
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(setting.workers, spawn, initializer=load_global, initargs=(setting,)) as processes,
        called_by_agents(setting.agents, lambda pairs: processes.submit(predict_global, pairs).result()) as run,
    ):
        yield run


@contextmanager
def infinity(setting: Setting) -> Iterator[Run]:
    """Infinity's engine, which batches its callers' requests, on an event loop in a thread of its own."""
    try:
        from infinity_emb import AsyncEngineArray, EngineArgs
    except Exception as error:
        raise NotRun(in_words(error)) from error
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    try:
        try:
            engines = AsyncEngineArray.from_args(
                [
                    EngineArgs(
                        model_name_or_path=setting.folder,
                        engine="torch",
                        device=setting.device.partition(":")[0],
                        dtype="float32",
                        bettertransformer=False,
                    )
                ]
            )
            engine = engines[0]
            call(engine.astart())
        except Exception as error:
            raise NotRun(in_words(error)) from error

        def score(pairs: Pairs) -> np.ndarray:
            found, _ = call(engine.rerank(query=pairs[0][0], docs=[document for _, document in pairs]))
            scores = np.empty(len(pairs), dtype=np.float32)
            for position in found:
                scores[position.index] = position.relevance_score
            return scores

        with called_by_agents(setting.agents, score) as run:
            yield run
        call(engine.astop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def fastembed(setting: Setting) -> Iterator[Run]:
    """Package fastembed on ONNX Runtime: one session, which all threads call."""
    setting.on_cpu_only()
    try:
        from fastembed.common.model_description import ModelSource
        from fastembed.rerank.cross_encoder import TextCrossEncoder

        onnx = export(setting)
        with suppress(ValueError):  # registered by an earlier run
            TextCrossEncoder.add_custom_model("bench", sources=ModelSource(hf="bench/bench"), model_file=onnx.name)
        model = TextCrossEncoder("bench", specific_model_path=str(onnx.parent))
    except Exception as error:
        raise NotRun(in_words(error)) from error

    def score(pairs: Pairs) -> np.ndarray:
        return sigmoid(np.array(list(model.rerank_pairs(pairs))))

    with called_by_agents(setting.agents, score) as run:
        yield run


@contextmanager
def flashrank(setting: Setting) -> Iterator[Run]:
    """FlashRank on ONNX Runtime: one session, one batch a request. It loads models by name: ours has a known one's."""
    setting.on_cpu_only()
    try:
        from flashrank import Ranker, RerankRequest
        from flashrank.Config import default_model, model_file_map

        onnx = export(setting)
        home = onnx.parent.parent / "flashrank" / default_model
        if not home.exists():
            shutil.copytree(onnx.parent, home)
            (home / onnx.name).rename(home / model_file_map[default_model])
            shutil.copy(BUILTIN_FOLDER / "special_tokens_map.json", home)
        level = logging.getLogger().level
        ranker = Ranker(default_model, cache_dir=str(home.parent), log_level="WARNING")
        logging.getLogger().setLevel(level)
    except Exception as error:
        raise NotRun(in_words(error)) from error

    def score(pairs: Pairs) -> np.ndarray:
        passages = [{"id": i, "text": document} for i, (_, document) in enumerate(pairs)]
        scores = np.empty(len(pairs), dtype=np.float32)
        for passage in ranker.rerank(RerankRequest(query=pairs[0][0], passages=passages)):
            scores[passage["id"]] = passage["score"]
        return scores

    with called_by_agents(setting.agents, score) as run:
        yield run


@contextmanager
def pool(setting: Setting, dtype: str) -> Iterator[Run]:
    """A pool of this package."""
    spec = ModelSpec(setting.folder, dtype=dtype)
    with (
        RerankerPool(spec, devices=setting.device, workers=setting.workers, coalesce=False) as workers,
        called_by_agents(setting.agents, lambda pairs: workers.submit_pairs(pairs).result()) as run,
    ):
        yield run


#: name on the command line -> name in tables, contender
CONTENDERS: dict[str, tuple[str, Contender]] = {
    "lock": (BASELINE, locked),
    "one-each": ("one CrossEncoder for each thread", one_each),
    "predict": ("CrossEncoder.predict, one caller with all the pairs", all_at_once),
    "library-pool": ("CrossEncoder's own pool and a lock, as it comes", library_pool),
    "library-pool-tuned": ("CrossEncoder's own pool and a lock, tuned", library_pool_tuned),
    "executor": ("ProcessPoolExecutor, a model in each process", executor),
    "infinity": ("Infinity's engine (torch)", infinity),
    "fastembed": ("fastembed (ONNX Runtime)", fastembed),
    "flashrank": ("FlashRank (ONNX Runtime)", flashrank),
    "mp_rerank": (OURS, partial(pool, dtype="float32")),
    "mp_rerank-bfloat16": ("mp_rerank, bfloat16", partial(pool, dtype="bfloat16")),
    "mp_rerank-float16": ("mp_rerank, float16", partial(pool, dtype="float16")),
}


def load_model(setting: Setting) -> CrossEncoder:
    """The model in this process."""
    return CrossEncoder(setting.folder, device=setting.device)


def predict(model: CrossEncoder, pairs: Pairs, **options: Any) -> np.ndarray:
    """The scores of `CrossEncoder.predict`."""
    scores: np.ndarray = model.predict(pairs, show_progress_bar=False, **options)
    return scores


def load_global(setting: Setting) -> None:
    """The initializer of the plain executor's processes."""
    global _model
    torch.set_num_threads(1)
    _model = load_model(setting)


def predict_global(pairs: Pairs) -> np.ndarray:
    """The plain executor's task."""
    return predict(_model, pairs)


def export(setting: Setting) -> Path:
    """The path of the model as an ONNX file, beside a copy of its tokenizer; exported at the first call."""
    home = Path(setting.folder) / "onnx-export" / "model"
    if not (home / "model.onnx").exists():
        leave = shutil.ignore_patterns("onnx-export", "*.safetensors")
        shutil.copytree(setting.folder, home, ignore=leave, dirs_exist_ok=True)
        model = load_model(setting)
        inputs = dict(model.tokenizer([("a query", "a document")] * 2, return_tensors="pt"))
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs]
        axes = {name: {0: "batch", 1: "tokens"} for name in names}
        network = model.model if hasattr(model, "model") else model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about shapes that it takes for constant; throughput compares the scores
            torch.onnx.export(
                network.eval(),
                tuple(inputs[name] for name in names),
                str(home / "model.onnx"),
                input_names=names,
                output_names=["logits"],
                dynamic_axes={**axes, "logits": {0: "batch"}},
                dynamo=False,
            )
        del model, network
        gc.collect()
    return home / "model.onnx"


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """The activation that the library applies to the logits of a model with one label."""
    return 1 / (1 + np.exp(-logits))


def in_words(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@contextmanager
def threads_of_children(count: int) -> Iterator[None]:
    """Processes that are started in this context compute with `count` threads."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
