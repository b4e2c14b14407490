"""What becomes of one model's requests: each is scored, or it fails, expires or is cancelled.

The deployment says what came back from its workers; here it is turned into scores, or into errors, and the requests it
was the last of are told. Runs on the dispatcher's thread alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import numpy as np

from mp_rerank._scheduling.queue import RequestQueue, Slice, Suspect
from mp_rerank._scheduling.request import Request
from mp_rerank._workers.child import Scored
from mp_rerank._workers.logs import POOL_LOGGER, QueuedLogger
from mp_rerank.errors import RequestTimeoutError, RerankError, ScoringError, TextTooLongError, WorkerCrashedError
from mp_rerank.results import PoolStats

__all__ = ["Outcome", "Outcomes"]

Outcome = Literal["completed", "failed", "cancelled", "timed_out"]

logger = QueuedLogger(POOL_LOGGER)

# Texts differ in characters a token, by language and by vocabulary; slices follow what workers count.
OVERESTIMATE_SMOOTHING = 0.1
MAX_OVERESTIMATE = 4.0
# Of the pairs read: people should know that so many documents are cut off, and hear it once there are enough to tell.
WARN_OF_TRUNCATED = 0.03
PAIRS_TO_WARN_AFTER = 100


class Outcomes:
    """Gives the requests of a queue their scores or their errors.

    Args:
        model: the model's name, for messages.
        queue: the requests.
        nan_scores: as in `PoolConfig`.
        on_done: told of each request that is finished, and how.
        counts: counters to count in.

    Attributes:
        overestimate: estimated tokens for each that workers count.
    """

    def __init__(
        self,
        model: str,
        queue: RequestQueue,
        nan_scores: Literal["error", "none"],
        on_done: Callable[[Request, Outcome], None],
        counts: PoolStats,
    ) -> None:
        self.overestimate = 1.0
        self._model = model
        self._queue = queue
        self._nan_scores = nan_scores
        self._on_done = on_done
        self._counts = counts
        self._read = self._truncated = 0  # pairs, and those of them that were cut off
        self._warned = False

    def add(self, request: Request) -> None:
        """Let ``request`` wait for its scores; one whose scores are all kept has them now."""
        if not self._queue.add(request):
            request.resolve()
            self._on_done(request, "completed")

    def cancel(self, request: Request) -> bool:
        """Drop a request whose future was cancelled; whether it was one of the queue's."""
        if request.number not in self._queue.live:
            return False
        self._queue.drop(request)
        request.cancel()
        self._on_done(request, "cancelled")
        return True

    def expire(self, now: float) -> None:
        """Give the requests whose deadline has come what is scored, or the error."""
        for request in self._queue.expire(now):
            if request.partial:
                request.resolve()
            else:
                scored = len(request.pairs) - request.missing
                request.fail(
                    RequestTimeoutError(
                        f"{scored} of {len(request.pairs)} documents were scored within {request.timeout:g} s",
                        timeout=request.timeout or 0.0,
                        scored=scored,
                        total=len(request.pairs),
                    )
                )
            self._on_done(request, "timed_out")

    def fail(self, request: Request, error: RerankError) -> None:
        """Give a request, which is not in the queue any more, ``error``."""
        request.fail(error)
        self._on_done(request, "failed")

    def fail_all(self, error: RerankError) -> None:
        """Fail every request that is left, each with an error of its own: raising one adds to its traceback."""
        for request in list(self._queue.live.values()):
            self._queue.drop(request)
            self.fail(request, copy.copy(error))

    # What came back from a worker.

    def scored(self, slice_: Slice, scored: Scored, device: str, now: float) -> None:
        """Give the scores of ``slice_`` to the requests that want them; what has no score fails them."""
        scores = np.frombuffer(scored.scores, dtype=np.float32)
        if scored.num_labels is not None:
            scores = scores.reshape(-1, scored.num_labels)
        self._count(slice_, scored)
        too_long = {} if scored.readings is None else scored.readings.too_long
        refused = set(too_long)
        finite = np.isfinite(scores)
        if not finite.all():
            whole = np.all(finite.reshape(len(slice_), -1), axis=1)
            if self._nan_scores == "error":
                refused.update(np.flatnonzero(~whole).tolist())
            else:
                scores = np.where(whole if scores.ndim == 1 else whole[:, None], scores, np.float32(np.nan))
        for place in sorted(refused):
            for suspect in self._queue.refuse(slice_, [place]):
                if place in too_long:
                    self.fail(suspect.request, _too_long(suspect.index, *too_long[place]))
                else:
                    error = ScoringError("", cause=f"its score is {scores[place]}")
                    self._could_not_be_scored(suspect, device, error)
        began_at = now - scored.seconds
        for request, _ in slice_.parts:
            request.began(began_at, scored.tokenize_seconds)
        for request in self._queue.fill(slice_, scores, scored.readings, refused):
            self._counts.split_requests += request.slices > 1
            request.began(began_at)  # once more, or for the first time: all its pairs went out for other requests
            request.complete(now)
            self._on_done(request, "completed")

    def raised(self, slice_: Slice, error: BaseException, device: str) -> None:
        """The model raised ``error`` on ``slice_``: a single pair fails its requests, others wait again, one by one."""
        for suspect in self._queue.raised(slice_):
            self._could_not_be_scored(suspect, device, error)

    def crashed(self, slice_: Slice, max_attempts: int, device: str, exit_code: int | None, how: str) -> list[Suspect]:
        """A worker ended while it ran ``slice_``: its pairs wait again, unless it is one that has ended too many.

        Args:
            how: the worker ended, in words.

        Returns:
            The requests that failed for it.
        """
        suspects = self._queue.crashed(slice_, max_attempts)
        for suspect in suspects:
            self.fail(
                suspect.request,
                WorkerCrashedError(
                    f"document {suspect.index} ended {suspect.attempts} workers; the last, on {device}, {how}",
                    device=device,
                    exit_code=exit_code,
                    attempts=suspect.attempts,
                    document_index=suspect.index,
                ),
            )
        return suspects

    def _could_not_be_scored(self, suspect: Suspect, device: str, error: BaseException) -> None:
        cause = error.cause if isinstance(error, ScoringError) else repr(error)
        self.fail(
            suspect.request,
            ScoringError(
                f"document {suspect.index} could not be scored on {device}: {cause}",
                device=device,
                document_index=suspect.index,
                cause=cause,
                details=error.details if isinstance(error, ScoringError) else "",
            ),
        )

    def _count(self, slice_: Slice, scored: Scored) -> None:
        counts, readings = self._counts, scored.readings
        counts.slices += 1
        counts.gathered_slices += len(slice_.parts) > 1
        size = 1 << (len(slice_) - 1).bit_length()
        counts.slice_sizes[size] = counts.slice_sizes.get(size, 0) + 1
        counts.scored_pairs += len(slice_)
        counts.busy_seconds += scored.seconds
        if readings is not None and (tokens := sum(readings.tokens)):
            counts.scored_tokens += tokens
            ratio = min(MAX_OVERESTIMATE, max(1 / MAX_OVERESTIMATE, slice_.tokens / tokens))
            self.overestimate += OVERESTIMATE_SMOOTHING * (ratio - self.overestimate)
            counts.truncated_pairs += sum(readings.truncated)
            self._warn_of_truncation(len(slice_), sum(readings.truncated))

    def _warn_of_truncation(self, pairs: int, truncated: int) -> None:
        """Say once that many documents are not read whole."""
        self._read += pairs
        self._truncated += truncated
        if self._read < PAIRS_TO_WARN_AFTER or self._truncated <= WARN_OF_TRUNCATED * self._read or self._warned:
            return
        self._warned = True
        logger.warning(
            "%d of the first %d documents do not fit %s with their queries, and were cut off: "
            "long_documents='chunk' scores them whole, truncation='error' refuses them "
            "[mp-rerank explain documents-cut-off]",
            *(self._truncated, self._read, self._model),
        )


def _too_long(index: int, tokens: int, limit: int) -> TextTooLongError:
    return TextTooLongError(
        f"document {index} is too long: {tokens} tokens, where {limit} are allowed (truncation='error')",
        document_index=index,
        tokens=tokens,
        limit=limit,
    )
