"""The process that `race-where` runs, ``python -m bench.faults.race_watch THREADS text|json``: it watches threads.

It wraps functions of the libraries that change state of the whole process while a thread is inside. Such a function is
called a place here. For each call it notes the state that the thread finds and the state that it leaves. The first time
that a thread enters a place while another thread is inside, it takes both stacks.

Each part runs in a process of its own: threads load in one dtype, load in two dtypes, score with one model, and score
through the library's pool.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import transformers

from mp_rerank._engine.loading import module_of
from mp_rerank.race import cases
from mp_rerank.race.command import versions
from mp_rerank.race.rounds import MODELS, kind_of, only_json, requests, together

FRAMES = 7
NOTES = 12
ROUNDS = 10
SITE_PACKAGES = Path(np.__file__).parent.parent


class Place:
    """A function that changes state of the whole process, and a record of the threads that were inside."""

    def __init__(self, name: str, state: str, look: Callable[[], Any]) -> None:
        self.name = name
        self.state = state
        self.look = look
        self.entries = 0
        self.most_at_once = 0
        self.inside: list[int] = []
        self.notes: list[str] = []
        self.stacks: dict[str, list[str]] = {}
        self._lock = threading.Lock()

    def enter(self, what: str | None = None) -> None:
        me = threading.get_ident()
        with self._lock:
            self.entries += 1
            others = [other for other in self.inside if other != me]
            self.inside.append(me)
            self.most_at_once = max(self.most_at_once, len(set(self.inside)))
            if others and not self.stacks:
                frames = sys._current_frames()  # this thread has the interpreter's lock: the others stand still
                self.stacks = {thread_name(ident): stack_of(frames[ident]) for ident in (others[0], me)}
            beside = f", with {', '.join(sorted(map(thread_name, set(others))))} inside" if others else ""
            self._note(f"{thread_name(me)} enters{beside}: {what or self._now()}")

    def leave(self) -> None:
        me = threading.get_ident()
        with self._lock:
            self.inside.remove(me)
            self._note(f"{thread_name(me)} leaves: {self._now()}")

    def _now(self) -> str:
        return f"{self.state} is {cases.named(self.look())}"

    def _note(self, line: str) -> None:
        if self.notes or "with" in line:  # from the first time that two threads are inside
            self.notes.append(line)

    def as_json(self) -> dict[str, Any]:
        return {
            "place": self.name,
            "state": self.state,
            "entries": self.entries,
            "most_at_once": self.most_at_once,
            "notes": self.notes[:NOTES],
            "stacks": self.stacks,
            "left_as": self._now(),
        }


def thread_name(ident: int) -> str:
    return next((thread.name for thread in threading.enumerate() if thread.ident == ident), str(ident))


def stack_of(frame: FrameType) -> list[str]:
    """The innermost frames in the libraries, outermost first, each as ``package/file.py:line function``."""
    kept = []
    for entry in traceback.extract_stack(frame):
        path = Path(entry.filename)
        if path.is_relative_to(SITE_PACKAGES):
            kept.append(f"{path.relative_to(SITE_PACKAGES).as_posix()}:{entry.lineno} {entry.name}")
        elif path.name == "queues.py":
            kept.append(f"multiprocessing/queues.py:{entry.lineno} {entry.name}")
    return kept[-FRAMES:]


def watch(owner: Any, attribute: str, state: str, look: Callable[[], Any]) -> list[Place]:
    """Wrap the function or context manager ``owner.attribute``; no place if this version has none of that name."""
    original = getattr(owner, attribute, None)
    if original is None:
        return []
    name = f"{getattr(owner, '__name__', owner)}.{attribute}"
    place = Place(name, state, look)
    if inspect.isgeneratorfunction(inspect.unwrap(original)):

        @contextmanager
        def managed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            place.enter()
            try:
                with original(*args, **kwargs) as value:
                    yield value
            finally:
                place.leave()

        setattr(owner, attribute, managed)
    else:

        @functools.wraps(original)
        def called(*args: Any, **kwargs: Any) -> Any:
            place.enter()
            try:
                return original(*args, **kwargs)
            finally:
                place.leave()

        setattr(owner, attribute, called)
    return [place]


def watch_default_dtype() -> list[Place]:
    """Wrap ``torch.set_default_dtype``: a thread is inside until it sets the normal dtype again."""
    original, normal = torch.set_default_dtype, torch.get_default_dtype()
    place = Place("torch.set_default_dtype", "torch.get_default_dtype()", torch.get_default_dtype)

    def set_default_dtype(dtype: torch.dtype) -> None:
        me = threading.get_ident()
        if dtype != normal:
            place.enter(f"the default dtype is {torch.get_default_dtype()}, and set to {dtype}")
            original(dtype)
        else:
            found = torch.get_default_dtype()
            original(dtype)
            if me in place.inside:
                place.leave()
            elif place.inside:
                with place._lock:
                    place._note(f"{thread_name(me)} sets {dtype}: it was {found}")

    torch.set_default_dtype = set_default_dtype
    return [place]


def loading_places() -> list[Place]:
    """The places in ``from_pretrained``, of all known versions."""
    utils: Any = transformers.modeling_utils
    base: Any = transformers.PreTrainedModel
    initialization: Any
    try:
        initialization = importlib.import_module("transformers.initialization")  # since transformers 5
    except ImportError:
        initialization = None
    module: Any = torch.nn.Module
    found = [
        watch(utils, "init_empty_weights", "torch.nn.Module.register_parameter", lambda: module.register_parameter),
        watch(utils, "no_init_weights", "transformers.modeling_utils._init_weights", lambda: utils._init_weights),
        watch(initialization, "no_tie_weights", "PreTrainedModel.tie_weights", lambda: base.tie_weights),
        watch(initialization, "meta_device_safe_creation_ops", "torch.linspace", lambda: torch.linspace),
        # Only since transformers 5 does it replace torch's functions.
        watch(base, "initialize_weights", "torch.nn.init.normal_", lambda: torch.nn.init.normal_)
        if hasattr(initialization, "guard_torch_init_functions")
        else [],
        watch_default_dtype(),
    ]
    return list(itertools.chain.from_iterable(found))


def loading(send: Connection, folder: Path, threads: int, dtypes: Sequence[str | None]) -> None:
    """Threads load a model, round after round, until a load fails or leaves state changed."""
    places = loading_places()
    found: list[str] = []
    for turn in range(1, ROUNDS + 1):
        works = [partial(cases.load, folder, MODELS[0], dtypes[i % len(dtypes)]) for i in range(threads)]
        for outcome, wanted in zip(together(works), itertools.cycle(dtypes)):
            if isinstance(outcome, Exception):
                found.append(f"in round {turn}: {kind_of(outcome)}")
            elif wanted and cases.dtypes_of(outcome) != {cases.DTYPES[wanted]}:
                got = " and ".join(sorted(map(str, cases.dtypes_of(outcome))))
                found.append(f"in round {turn}: asked for {wanted}, got {got}")
        if found or (len(dtypes) == 1 and cases.altered()):
            break
    facts = [f"{line} ({found.count(line)} of {threads})" for line in sorted(set(found))]
    facts += [f"left behind: {line}" for line in cases.altered()]
    send.send({"facts": facts, "places": [place.as_json() for place in places if place.entries]})


def meta_device(send: Connection, folder: Path, threads: int) -> None:
    """Whether ``with torch.device("meta")`` in one thread changes where another thread makes tensors."""
    inside, looked = threading.Event(), threading.Event()

    def hold() -> str:
        with torch.device("meta"):
            inside.set()
            looked.wait()
            return str(torch.empty(1).device)

    def look() -> str:
        inside.wait()
        found = str(torch.empty(1).device)
        looked.set()
        return found

    held, seen = together([hold, look])
    send.send(
        {"facts": [f"the thread inside makes tensors on {held}, the other at that moment on {seen}"], "places": []}
    )


def predicting(send: Connection, folder: Path, threads: int) -> None:
    """What ``predict`` changes of the model that threads share: its device, its mode, its tokenizer, its activation."""
    asked = requests(threads)
    model = cases.load(folder)
    network = module_of(model)
    backend = type(model.tokenizer)
    places = watch(
        backend, "set_truncation_and_padding", "the tokenizer's truncation", lambda: _truncation(model.tokenizer)
    )
    counts = dict.fromkeys(("_apply (under to, cuda, half, …)", "train (under eval)"), 0)
    moving: list[list[str]] = []
    for name, label in zip(("_apply", "train"), counts, strict=True):
        original = getattr(torch.nn.Module, name)

        @functools.wraps(original)
        def counted(self: Any, *args: Any, _original: Any = original, _label: str = label, **kwargs: Any) -> Any:
            if self is network:
                counts[_label] += 1
                if "_apply" in _label and not moving:
                    moving.append(stack_of(sys._getframe()))
            return _original(self, *args, **kwargs)

        setattr(torch.nn.Module, name, counted)
    before = [(name, p.device, p.data_ptr()) for name, p in network.named_parameters()]
    outcomes = together([partial(cases.predict, model, pairs, batch_size=8) for pairs in asked])
    after = [(name, p.device, p.data_ptr()) for name, p in network.named_parameters()]
    facts = [f"{threads} threads, one predict each; {sum(isinstance(o, Exception) for o in outcomes)} raised"]
    facts += [f"torch.nn.Module.{label} was called on the model {count} times" for label, count in counts.items()]
    facts += [f"  from {' > '.join(stack)}" for stack in moving[:1]]
    facts.append(f"parameters on another device or at another address afterwards: {sum(map(_differ, before, after))}")
    if hasattr(model, "activation_fn"):
        found, place = sharing_activation(model, asked)
        facts += found
        places.append(place)
    if "device" in inspect.signature(type(model).predict).parameters:
        try:
            cases.predict(model, asked[0], device="meta")
        except Exception:  # meta gives no scores; what matters is the model's device afterwards
            pass
        devices = ", ".join(sorted({str(parameter.device) for parameter in network.parameters()}))
        facts.append(f'predict(device="meta") left the model on {devices}: for every other caller too')
    send.send({"facts": facts, "places": [place.as_json() for place in places]})


def sharing_activation(model: Any, asked: Sequence[Any]) -> tuple[list[str], Place]:
    """Whether the ``activation_fn`` of one thread's ``predict`` is applied to another thread's scores."""
    own = model.activation_fn
    place = Place("CrossEncoder.predict", "the model's activation_fn", lambda: type(model.activation_fn))
    swapped: list[str] = []

    def predict(pairs: Any, wanted: torch.nn.Module) -> None:
        original = wanted.forward

        def forward(logits: Any) -> Any:
            if callers[threading.get_ident()] is not wanted:
                swapped.append(f"{threading.current_thread().name}'s scores went through another's activation")
            return original(logits)

        wanted.forward = forward
        callers[threading.get_ident()] = wanted
        place.enter(f"it asks for {type(wanted).__name__}")
        try:
            cases.predict(model, pairs, wanted, batch_size=8)
        finally:
            place.leave()

    callers: dict[int, torch.nn.Module] = {}
    kinds = itertools.cycle((torch.nn.Sigmoid, torch.nn.Identity))
    together([partial(predict, pairs, kind()) for pairs, kind in zip(asked, kinds, strict=False)])
    facts = [f"{line}, in {swapped.count(line)} batches" for line in sorted(set(swapped))]
    facts = facts or ["every thread's scores went through the activation it asked for"]
    now = model.activation_fn
    facts.append(
        f"predict(activation_fn=...) left the model's own as it was, {type(own).__name__}"
        if now is own
        else f"predict(activation_fn=...) changed the model's own from {type(own).__name__} to {type(now).__name__}: "
        "the next caller's"
    )
    return facts, place


def _differ(one: Any, other: Any) -> bool:
    return bool(one != other)


def _truncation(tokenizer: Any) -> str:
    settings = tokenizer._tokenizer.truncation
    return "not set" if settings is None else f"to {settings['max_length']}"


class RecordingQueue:
    """One of the library pool's two queues; notes which thread put or took each item."""

    def __init__(self, queue: Any, place: Place) -> None:
        self._queue = queue
        self._place = place
        self.notes: list[tuple[str, Any]] = []

    def put(self, item: Any) -> None:
        self.notes.append((threading.current_thread().name, item))
        self._queue.put(item)

    def get(self, *args: Any, **kwargs: Any) -> Any:
        self._place.enter()
        try:
            item = self._queue.get(*args, **kwargs)
        finally:
            self._place.leave()
        self.notes.append((threading.current_thread().name, item))
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


def sharing_pool(send: Connection, folder: Path, threads: int) -> None:
    """Whether a thread takes chunks of other threads from the library pool's one queue of results."""
    if not cases.has_library_pool():
        send.send({"facts": ["this version's CrossEncoder has no pool of its own"], "places": []})
        return
    model = cases.load(folder)
    asked = requests(threads)
    alone = {i: np.asarray(cases.predict(model, pairs)) for i, pairs in enumerate(asked)}
    pool = model.start_multi_process_pool(["cpu"] * cases.LIBRARY_POOL_WORKERS)
    try:
        cases.predict(model, asked[0], pool=pool)
        place = Place('pool["output"].get', "the number of chunks taken so far", lambda: len(results.notes))
        results = RecordingQueue(pool["output"], place)
        shared = {**pool, "output": results}
        outcomes = together([partial(cases.predict, model, pairs, pool=shared) for pairs in asked])
        taken = [(name, chunk, _whose(scores, alone)) for name, (chunk, scores) in results.notes]
        others = [(name, chunk, owner) for name, chunk, owner in taken if owner not in (name, None)]
        facts = [
            f"{len(taken)} chunks taken, {len(others)} of them another thread's",
            *(f"  {name} took chunk {chunk} with the scores of {owner}'s pairs" for name, chunk, owner in others[:6]),
            *(f"agent {i}: {kind_of(o)}" for i, o in enumerate(outcomes) if isinstance(o, Exception)),
        ]
        wrong = sum(
            not isinstance(o, Exception) and not np.allclose(o, alone[i], atol=1e-4) for i, o in enumerate(outcomes)
        )
        facts.append(f"calls that returned scores not theirs: {wrong}")
        send.send({"facts": facts, "places": [place.as_json()]})
    finally:
        model.stop_multi_process_pool(pool)


def _whose(scores: Any, alone: dict[int, np.ndarray]) -> str | None:
    """The thread whose request has all of ``scores`` among its own; None if no thread or several have."""
    if isinstance(scores, Exception):
        return None
    found = [
        number
        for number, known in alone.items()
        if all(np.abs(known - score).min() < 1e-5 for score in np.asarray(scores, dtype=np.float32).reshape(-1))
    ]
    return f"agent {found[0]}" if len(found) == 1 else None


PARTS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "loading, all in the checkpoint's dtype": (loading, ((None,),)),
    "loading, half in float32 and half in bfloat16": (loading, (("float32", "bfloat16"),)),
    'inside torch.device("meta")': (meta_device, ()),
    "predict on one model": (predicting, ()),
    "the library's pool": (sharing_pool, ()),
}


def as_text(title: str, said: dict[str, Any]) -> Iterator[str]:
    """The lines of one part."""
    yield f"=== {title}"
    if "failure" in said:
        yield said["failure"]
        return
    yield from said["facts"]
    for place in said["places"]:
        yield ""
        times, most = place["entries"], place["most_at_once"]
        yield f"--- {place['place']}: entered {times} times, by at most {most} threads at once"
        yield from ([f"    in the end {place['left_as']}"] if not place["stacks"] else [])
        for name, stack in place["stacks"].items():
            yield f"    {name}, at that moment:"
            yield from (f"        {frame}" for frame in stack)
        if place["stacks"]:
            yield from (f"    {note}" for note in place["notes"])
            yield f"    in the end {place['left_as']}"


def main(arguments: Sequence[str]) -> None:
    """Run every part; see the module's docstring."""
    threads, form = int(arguments[0]), arguments[1]
    parts = {}
    with only_json() as out, tempfile.TemporaryDirectory(prefix="mp_rerank_race_") as place:
        cases.make_models(Path(place))
        for title, (part, options) in PARTS.items():
            for said in cases.apart(part, Path(place), threads, *options):
                parts[title] = said
        if form == "json":
            print(json.dumps(parts, indent=2), file=out)
        else:
            print(", ".join(f"{name} {number}" for name, number in versions().items()), file=out)
            for title, said in parts.items():
                print("", *as_text(title, said), sep="\n", file=out)


if __name__ == "__main__":
    main(sys.argv[1:])
