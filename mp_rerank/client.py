"""`connect`: a pool on a server (``mp-rerank serve``), with the calls of one in this process.

    import mp_rerank

    with mp_rerank.connect("http://127.0.0.1:8080") as pool:
        for result in pool.rerank("how do birds fly?", documents, top_n=5):
            print(result.relevance_score, result.document)

One thread, with an event loop, talks to the server for all threads that use the client. Documents stay here: texts go
out, scores come back. Needs the extra ``client``.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
import uuid
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypedDict
from urllib.parse import quote

import numpy as np

from mp_rerank._arguments import check_caller
from mp_rerank._calls import Asked, RerankerCalls
from mp_rerank._checks import check_flag, check_seconds, is_for_ever
from mp_rerank._link import GRACE_SECONDS, Link, Refusal
from mp_rerank._pairs import Reading
from mp_rerank._scheduling.futures import PoolFuture, check_may_wait, result_of
from mp_rerank._scheduling.streams import AsyncScoreStream, Feed, ScoreStream
from mp_rerank._wire import CALLER_HEADER, REQUEST_ID_HEADER, scores_from_json
from mp_rerank.errors import (
    ModelLoadError,
    PoolClosedError,
    RequestTimeoutError,
    ScoringError,
    TextTooLongError,
    WorkerCrashedError,
)
from mp_rerank.results import CallerStats, PoolMemory, PoolStats, WorkerExit, WorkerInfo, WorkerMemory

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RerankerClient", "connect"]

ENVIRONMENT = "MP_RERANK_API_KEY"
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 2.0
# Of `RequestOptions`, those that the server follows as they are.
OPTIONS = (
    "on_timeout",
    "priority",
    "instruction",
    "prompt_name",
    "max_tokens_per_doc",
    "truncation",
    "long_documents",
)
# What a stream asks for at a time, and a request at most: less than servers accept.
STREAM_PAIRS = 64
CHUNK_PAIRS = 1000
CHUNK_CHARACTERS = 2_000_000
CHUNKS_AT_A_TIME = 4


class ClientKeywords(TypedDict, total=False):
    """What `RerankerClient` takes beside its URL, for type checkers and editors."""

    model: str | None
    api_key: str | None
    caller: str | None
    activation: Literal["sigmoid", "identity"] | None
    overload: Literal["block", "raise"] | float
    retry_for: float


def connect(url: str, **options: Unpack[ClientKeywords]) -> RerankerClient:
    """A client of the server at ``url``, with the options of `RerankerClient`. It connects with the first request."""
    return RerankerClient(url, **options)


class RerankerClient(RerankerCalls):
    """A pool on a server; see ``RerankerPool`` for its calls.

    Errors are the pool's own. Those of admission (``PoolOverloadedError``) and of a closed server come with the future.
    ``ScoringError.details`` is only its cause: tracebacks stay with the server. Besides there is RerankError where the
    server cannot be reached, or refuses the key, and ModelLoadError where it does not serve the model.

    It connects with the first request, or with ``start()``. It may be pickled, its key with it, and used in a forked
    process. ``close()`` ends the client, and not the server.

    Args:
        url: ``"http://host:port"``, ``"https://..."``, or ``"unix:/path"``.
        model: which of the server's models; ``None``: its first.
        api_key: the key, if the server wants one; ``None``: the variable ``MP_RERANK_API_KEY``, if it is set.
        caller: whose requests these are, to a server without keys; ``None``: this client's connection's.
        activation: ``"sigmoid"`` of the logits, or ``"identity"``: the logits; ``None``: the model's own.
        overload: what becomes of a request that the server has no room for: ``"block"``: it is tried again until its
            timeout; ``"raise"`` PoolOverloadedError; or a number of seconds to try for.
        retry_for: seconds to try again for, where the server cannot be reached, breaks off or is leaving. To score a
            pair twice does no harm.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        ModuleNotFoundError: httpx is not installed: the extra ``client``.

    Attributes:
        url: the server's.
        model: which of its models; ``None``: its first.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        caller: str | None = None,
        activation: Literal["sigmoid", "identity"] | None = None,
        overload: Literal["block", "raise"] | float = "block",
        retry_for: float = 30.0,
    ) -> None:
        _check_text("url", url)
        if not url.startswith(("http://", "https://", "unix:")):
            raise ValueError(f"url: 'http://…', 'https://…' or 'unix:/path' is needed, not {url!r}")
        for name, value in (("model", model), ("api_key", api_key)):
            if value is not None:
                _check_text(name, value)
        if activation not in (None, "sigmoid", "identity"):
            raise ValueError(f"activation: 'sigmoid', 'identity' or None is needed, not {activation!r}")
        if isinstance(overload, str):
            if overload not in ("block", "raise"):
                raise ValueError(f"overload: 'block', 'raise' or seconds are needed, not {overload!r}")
        else:
            overload = check_seconds("overload", overload)
        self.url = url
        self.model = model
        self._api_key = api_key if api_key is not None else os.environ.get(ENVIRONMENT) or None
        self._activation = activation
        self._caller = None if caller is None else check_caller(caller)
        self._overload = overload
        self._retry_for = check_seconds("retry_for", retry_for)
        self._closed = False
        self._links: dict[int, Link] = {}  # by process: a fork has none of its parent's threads
        import httpx  # noqa: F401  # said now, and not in a thread of the client's

    def __repr__(self) -> str:
        state = "closed" if self._closed else "ready" if self._links.get(os.getpid()) else "not started"
        return f"<RerankerClient {self.url!r}: {state}>"

    # Life.

    def start(self) -> RerankerClient:
        """Connect, and wait until the server has loaded its model. Does nothing on a client that has.

        Raises:
            RerankError: it cannot be reached; ModelLoadError: it does not serve the model, or has no workers left.
            PoolClosedError: the client is closed.
        """
        self._started()
        return self

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Submit nothing more, and wait for what is pending. The server goes on.

        Args:
            drain: wait for what is pending; otherwise it fails with ``PoolClosedError`` and is cancelled on the server.
            timeout: seconds to wait for, after which what is left fails as with ``drain=False``; ``None``: no limit.
        """
        check_flag("drain", drain)
        if timeout is not None:
            timeout = check_seconds("timeout", timeout)
            timeout = None if is_for_ever(timeout) else timeout
        self._closed = True
        link = self._links.pop(os.getpid(), None)
        if link is not None:
            link.close(drain=drain, timeout=timeout)

    def __enter__(self) -> RerankerClient:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(drain=kind is None)

    def for_caller(self, caller: str) -> RerankerClient:
        """A client of the same server whose requests are ``caller``'s; see ``RerankerPool.for_caller``.

        It shares this client's connections, and is to be closed no more than a pool's handle. A server with API keys
        knows its callers by these, whatever they call themselves.
        """
        return _CallerClient(self, check_caller(caller))

    # Looking in.

    def stats(self) -> PoolStats:
        """The counters of the server's pool, since its start, of all callers."""
        said = self._model_status()["stats"]
        callers = {name: CallerStats(**_known(CallerStats, counts)) for name, counts in said["callers"].items()}
        sizes = {int(size): count for size, count in said.get("slice_sizes", {}).items()}  # JSON's names are strings
        return PoolStats(**{**_known(PoolStats, said), "callers": callers, "slice_sizes": sizes})

    def workers(self) -> list[WorkerInfo]:
        """The server's workers."""
        found = []
        for said in self._model_status()["workers"]:
            facts = _known(WorkerInfo, said)
            if facts.get("last_exit") is not None:
                facts["last_exit"] = WorkerExit(**_known(WorkerExit, facts["last_exit"]))
            facts.update({name: tuple(value) for name, value in facts.items() if isinstance(value, list)})
            found.append(WorkerInfo(**facts))
        return found

    def memory(self) -> PoolMemory:
        """Memory of the server's process and of its workers, as it read them in the last seconds."""
        said = self._model_status()["memory"]
        workers = tuple(WorkerMemory(**_known(WorkerMemory, worker)) for worker in said["workers"])
        return PoolMemory(WorkerMemory(**_known(WorkerMemory, said["parent"])), workers)

    def _model_status(self) -> dict[str, Any]:
        link = self._link()
        check_may_wait()
        status: dict[str, Any] = link.run(self._status(link)).result()
        return status

    # Within.

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError("the client is closed")

    def _link(self) -> Link:
        """The process's link to the server, made by the first to come here."""
        self._check_open()
        link = self._links.get(os.getpid())
        if link is None:
            made = Link(self.url, self._api_key)
            link = self._links.setdefault(os.getpid(), made)
            if link is made:
                weakref.finalize(self, made.end, drain=False).atexit = False
            else:
                made.end(drain=False)
        return link

    def _started(self) -> Link:
        link = self._link()
        if link.num_labels is None:
            check_may_wait()
            link.run(self._start(link)).result()
        return link

    async def _start(self, link: Link) -> None:
        """Wait until the model is ready; learn how many scores a pair it gives."""
        for attempt in _attempts():
            status = await self._status(link)
            if status["state"] == "ready":
                link.num_labels = status["num_labels"]
                return
            if status["state"] == "failed":
                raise ModelLoadError(f"{status['model']} has no workers left at {self.url}", model=status["model"])
            await asyncio.sleep(attempt)

    async def _status(self, link: Link) -> dict[str, Any]:
        params = {} if self.model is None else {"model": self.model}
        response = await self._answered(link, "GET", "/status", deadline=None, params=params)
        models: list[dict[str, Any]] = response["models"]
        return models[0]

    def _submit(self, asked: Asked) -> Future[Any]:
        return self._enter(self._started(), asked)

    def _result(self, asked: Asked) -> Any:
        future = self._enter(self._started(), asked)
        try:
            return future.result()
        finally:
            future.cancel()  # of a finished one: nothing

    async def _awaited(self, asked: Asked) -> Any:
        link = self._link()
        if link.num_labels is None:
            await asyncio.wrap_future(link.run(self._start(link)))
        return await result_of(self._enter(link, asked))

    def _stream(self, asked: Asked) -> ScoreStream:
        feed = Feed()
        stream = ScoreStream(feed)
        try:
            stream.follow(self._enter(self._started(), asked, feed))
        except BaseException:
            stream.close()
            raise
        return stream

    def _astream(self, asked: Asked) -> AsyncScoreStream:
        feed = Feed()

        async def enter() -> Future[Any]:
            link = self._link()
            if link.num_labels is None:
                await asyncio.wrap_future(link.run(self._start(link)))
            return self._enter(link, asked, feed)

        return AsyncScoreStream(feed, enter)

    def _enter(self, link: Link, asked: Asked, feed: Feed | None = None) -> Future[Any]:
        """Have ``asked`` scored by the server; its future."""
        if asked.ranking and link.num_labels != 1:
            raise ValueError(
                f"{self.url} gives {link.num_labels} scores a pair, and ranking needs one: use submit_pairs"
            )
        future = PoolFuture()
        if feed is not None:
            future.add_internal_callback(feed.end)
        link.fulfil(future, self._score(link, asked, feed))
        return future

    async def _score(self, link: Link, asked: Asked, feed: Feed | None) -> Any:
        """The result of ``asked``, which is sent in chunks: a server bounds what a request may hold."""
        assert link.num_labels is not None
        shape = (len(asked.pairs),) if link.num_labels == 1 else (len(asked.pairs), link.num_labels)
        scores = np.full(shape, np.nan, dtype=np.float32)
        there = np.zeros(len(asked.pairs), dtype=np.bool_)
        readings: list[Reading | None] = [None] * len(asked.pairs)
        turns = asyncio.Semaphore(CHUNKS_AT_A_TIME)

        async def score(start: int, end: int) -> None:
            async with turns:
                found = await self._score_chunk(link, asked, start, end)
            if found is None:  # expired
                return
            scores[start:end], there[start:end] = scores_from_json(found["scores"], link.num_labels or 1)
            readings[start:end] = _readings(found, end - start)
            if asked.options.on_timeout != "partial":
                there[start:end] = True
            if feed is not None:
                feed.put([(i, scores[i].tolist()) for i in range(start, end) if there[i]])

        limit = CHUNK_PAIRS if feed is None else STREAM_PAIRS
        await _all(score(start, end) for start, end in _chunks(asked.pairs, limit))
        return asked.finish(scores, there, readings)

    async def _score_chunk(self, link: Link, asked: Asked, start: int, end: int) -> dict[str, Any] | None:
        """What the server says of some pairs; ``None``: the request expired, and is to be a partial one."""
        pairs = asked.pairs[start:end]
        options = asked.options
        body: dict[str, Any] = {name: getattr(options, name) for name in OPTIONS}
        if self.model is not None:
            body["model"] = self.model
        if self._activation is not None:
            body["activation"] = self._activation
        if all(query is pairs[0][0] or query == pairs[0][0] for query, _ in pairs):
            body |= {"query": pairs[0][0], "documents": [document for _, document in pairs]}
        else:
            body["pairs"] = pairs
        try:
            answer = await self._answered(
                link, "POST", "/pairs", deadline=asked.deadline, body=body, caller=options.caller or self._caller
            )
        except RequestTimeoutError as error:
            if options.on_timeout == "partial":
                return None
            raise RequestTimeoutError(
                str(error), timeout=options.timeout or 0.0, scored=error.scored, total=len(asked.pairs)
            ) from None
        except (ScoringError, TextTooLongError, WorkerCrashedError) as error:
            if start and error.document_index is not None:  # it is counted from this chunk's first
                place = error.document_index
                error.args = (str(error).replace(f"document {place}", f"document {place + start}", 1),)
                error.document_index = place + start
            raise
        found: dict[str, Any] = answer
        return found

    async def _answered(
        self,
        link: Link,
        method: str,
        path: str,
        *,
        deadline: float | None,
        body: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
        caller: str | None = None,
    ) -> Any:
        """The server's answer, as JSON; tried again as long as that may help."""
        headers = {REQUEST_ID_HEADER: uuid.uuid4().hex}
        if caller is not None:
            headers[CALLER_HEADER] = quote(caller, safe=" !#$&'()*+,/:;=?@[]~")
        begun = time.monotonic()
        attempts = _attempts()
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise RequestTimeoutError("the request's time is over, and the server had no answer yet")
            if body is not None and left is not None:
                body["timeout"] = left
            refused = await link.ask(
                method, path, body, params, headers, None if left is None else left + GRACE_SECONDS
            )
            if not isinstance(refused, Refusal):
                return refused
            patience = self._patience(refused.status)
            pause = max(next(attempts), refused.retry_after)
            if time.monotonic() - begun + pause > patience:
                raise refused.error
            if deadline is not None:
                pause = min(pause, max(0.0, deadline - time.monotonic()))
            await asyncio.sleep(pause)

    def _patience(self, status: int) -> float:
        """Seconds to try again for, after an answer of this status; 0: none came."""
        if status == 429:
            if self._overload == "raise":
                return 0.0
            return math.inf if self._overload == "block" else self._overload
        return self._retry_for if status in (0, 502, 503) else 0.0

    # Copies.

    def __copy__(self) -> RerankerClient:
        return self

    def __deepcopy__(self, memo: object) -> RerankerClient:
        """The client itself: frameworks copy what holds it."""
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        again = partial(
            connect,
            model=self.model,
            api_key=self._api_key,
            caller=self._caller,
            activation=self._activation,
            overload=self._overload,
            retry_for=self._retry_for,
        )
        return again, (self.url,)


class _CallerClient(RerankerClient):
    """Another's client, with a caller of its own."""

    def __init__(self, client: RerankerClient, caller: str) -> None:
        vars(self).update(vars(client))
        self._client = client
        self._caller = caller

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Submit nothing more through this one; what is pending goes on."""
        self._closed = True

    def _link(self) -> Link:
        self._check_open()
        return self._client._link()


async def _all(works: Any) -> None:
    """Do all at once; the first error ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _chunks(pairs: Sequence[tuple[str, str]], most: int) -> list[tuple[int, int]]:
    """Where to cut ``pairs``: so many, and so many characters, at a time."""
    cuts = []
    start = characters = 0
    for place, (query, document) in enumerate(pairs):
        length = len(query) + len(document)
        if place > start and (place - start == most or characters + length > CHUNK_CHARACTERS):
            cuts.append((start, place))
            start, characters = place, 0
        characters += length
    return [*cuts, (start, len(pairs))] if pairs else []


def _readings(found: dict[str, Any], count: int) -> list[Reading | None]:
    """What the model read of each pair, as far as the server says."""
    tokens, truncated = found.get("tokens"), found.get("truncated")
    if tokens is None or truncated is None:
        return [None] * count
    passages = found.get("passages") or [None] * count
    return [
        None if read is None else Reading(read, cut, None if passage is None else tuple(passage))
        for read, cut, passage in zip(tokens, truncated, passages, strict=True)
    ]


def _attempts() -> Any:
    """Seconds to wait before each further attempt: doubling, each anywhere in its upper half."""
    pause = RETRY_SECONDS
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(pause * 2, MAX_RETRY_SECONDS)


def _known(kind: Any, said: dict[str, Any]) -> dict[str, Any]:
    """What ``kind`` has fields for: a server of another version may say more."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in said.items() if name in names}


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: a string is needed, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}: it is empty")
