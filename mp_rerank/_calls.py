"""The calls that score, for whatever scores: a pool, a caller's handle of one, a pool that is loaded on demand.

Each call is checked here, in the thread of the caller, and becomes an `Asked`. What becomes of that is up to the class.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex

from mp_rerank._arguments import (
    Document,
    RequestKeywords,
    RequestOptions,
    check_top_n,
    deadline_of,
    documents_of,
    pairs_of,
    text_of,
)
from mp_rerank._cross_encoder import CrossEncoderCalls
from mp_rerank._pairs import Pair
from mp_rerank._scheduling.request import Finish, all_scores, nothing, rank
from mp_rerank._scheduling.streams import AsyncScoreStream, ScoreStream
from mp_rerank.results import RerankResult, Scores

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Asked", "RerankerCalls"]


@dataclass
class Asked:
    """What a caller asks for, checked: all that a request needs but what workers say of their model.

    Attributes:
        pairs: the pairs to score.
        finish: what becomes of their scores; see `Request`.
        ranking: whether ``finish`` needs one score a pair.
        options: the request's.
        deadline: when it expires, on the monotonic clock.
    """

    pairs: list[Pair]
    finish: Finish
    ranking: bool
    options: RequestOptions
    deadline: float | None

    @classmethod
    def ranking_of(
        cls, query: str, documents: Iterable[Document], top_n: SupportsIndex | None, keywords: RequestKeywords
    ) -> Asked:
        options = RequestOptions.of(keywords)
        text = text_of("query", query)
        kept = documents_of(documents)
        finish = partial(rank, kept.given, check_top_n(top_n), options.min_score, kept.records)
        pairs = [(text, document) for document in kept.texts]
        return cls(pairs, finish, True, options, deadline_of(options.timeout))

    @classmethod
    def scores_of(cls, pairs: Iterable[Sequence[str]], keywords: RequestKeywords) -> Asked:
        options = _every_score(RequestOptions.of(keywords))
        return cls(pairs_of(pairs), all_scores, False, options, deadline_of(options.timeout))

    @classmethod
    def stream_of(cls, query: str, documents: Iterable[Document], keywords: RequestKeywords) -> Asked:
        options = _every_score(RequestOptions.of(keywords))
        text = text_of("query", query)
        pairs = [(text, document) for document in documents_of(documents).texts]
        return cls(pairs, nothing, False, options, deadline_of(options.timeout))


def _every_score(options: RequestOptions) -> RequestOptions:
    """``options`` of a request that gets every score, and so has no use for a bound."""
    if options.min_score is not None:
        raise ValueError("min_score: it is for rankings (submit, rerank); this call gives every score")
    return options


class RerankerCalls(CrossEncoderCalls):
    """``submit`` and its kin, in terms of five ways to hand a request over."""

    def submit(
        self,
        query: str,
        documents: Iterable[Document],
        *,
        top_n: SupportsIndex | None = None,
        **options: Unpack[RequestKeywords],
    ) -> Future[list[RerankResult]]:
        """Rank ``documents`` by relevance to ``query``.

        Args:
            query: the query.
            documents: the documents, any number of them, from any iterable in an order: texts, and dicts with a text
                under ``"text"``, whose result has the dict as its ``record``.
            top_n: how many of the best to return; ``None``: all.
            timeout: seconds from now until the request expires; what is not scored then is dropped. ``None``: never.
            priority: from -8 to 8; each step doubles the request's share of what its caller gets, and none starves the
                others.
            on_timeout: ``"raise"`` RequestTimeoutError, or ``"partial"``: the ranking of what is scored by then,
                followed by the rest with a ``relevance_score`` of ``None``.
            caller: whose request it is: any string but an empty one. Callers that wait share the workers equally,
                however many requests each has. ``None``: this pool's own caller; see ``for_caller``.
            instruction: what to judge by, in words: goes before the query as it is, or into the system turn of a model
                with a chat template, as ``CrossEncoder.predict(prompt=...)`` has it. ``None``: the model's own.
            prompt_name: the same, by the name of one of the model's prompts (``WorkerInfo.prompts``).
            max_tokens_per_doc: how much of a document may be read, in tokens of the document alone. ``None``: as much
                as fits the model beside the query.
            truncation: what becomes of a document that is longer: its ``"end"`` or its ``"start"`` is cut off, or it
                is an ``"error"``: TextTooLongError, naming it.
            long_documents: what becomes of a document that is too long for the model: ``"truncate"`` it, or
                ``"chunk"``: divide it at ends of sentences, with an overlap, and score each chunk. The best one counts,
                and ``RerankResult.passage`` tells where it is.
            min_score: leave out documents that score less, and those that have no score.

        Returns:
            A future of the results, best first; equal scores in the order submitted. ``cancel()`` works until it is
            done, and its done-callbacks run on threads of their own. It may hold RequestTimeoutError, ScoringError,
            TextTooLongError, WorkerCrashedError or PoolClosedError.

        Raises:
            TypeError, ValueError: naming the argument; also for a model of several labels, which ranks nothing, and for
                an option that the model cannot follow.
            PoolClosedError, PoolOverloadedError: the request was not taken.
            ModelLoadError: from ``start``, if this is the first request.
        """
        return self._submit(Asked.ranking_of(query, documents, top_n, options))

    def submit_pairs(self, pairs: Iterable[Sequence[str]], **options: Unpack[RequestKeywords]) -> Future[Scores]:
        """Score ``(query, document)`` pairs, as ``CrossEncoder.predict`` does.

        Args:
            pairs: the pairs, in any mixture of queries.
            options: those of ``submit`` but ``top_n`` and ``min_score``. A partial result has NaN where there is no
                score.

        Returns:
            A future of float32 scores in the order of ``pairs``: shape (n,), or (n, num_labels) if there are several.

        Raises:
            As ``submit``.
        """
        return self._submit(Asked.scores_of(pairs, options))

    def rerank(
        self,
        query: str,
        documents: Iterable[Document],
        *,
        top_n: SupportsIndex | None = None,
        **options: Unpack[RequestKeywords],
    ) -> list[RerankResult]:
        """``submit(...).result()``: rank and wait. Interrupted, it cancels the request."""
        results: list[RerankResult] = self._result(Asked.ranking_of(query, documents, top_n, options))
        return results

    async def arerank(
        self,
        query: str,
        documents: Iterable[Document],
        *,
        top_n: SupportsIndex | None = None,
        **options: Unpack[RequestKeywords],
    ) -> list[RerankResult]:
        """``submit`` for asyncio: the loop goes on meanwhile, even while the pool starts or is full.

        Cancelling the task cancels the request.
        """
        results: list[RerankResult] = await self._awaited(Asked.ranking_of(query, documents, top_n, options))
        return results

    async def asubmit_pairs(self, pairs: Iterable[Sequence[str]], **options: Unpack[RequestKeywords]) -> Scores:
        """``submit_pairs`` for asyncio, as ``arerank`` is ``submit``: the scores."""
        scores: Scores = await self._awaited(Asked.scores_of(pairs, options))
        return scores

    def stream(self, query: str, documents: Iterable[Document], **options: Unpack[RequestKeywords]) -> ScoreStream:
        """Score ``documents``, and give each score as soon as it is there: for progress bars, or to stop early.

            for index, score in pool.stream(query, documents):
                ...

        Args:
            query, documents, options: as for ``submit``, but without ``top_n`` and ``min_score``. With
                ``on_timeout="partial"`` the iterator ends at the deadline.

        Returns:
            An iterator of ``(index, score)``, once for each document, a slice at a time and in no promised order. The
            score is the one that ``submit`` has; it is a list of numbers if the model gives several. Scores wait in the
            iterator for a slow caller, who delays nobody. ``close()``, leaving ``with`` or Ctrl-C cancels the rest, and
            so does losing the iterator, as ``break`` does. What came before an error is given first, then the iterator
            raises one of those that the future of ``submit`` may hold.

        Raises:
            As ``submit``, but for models of several labels.
        """
        return self._stream(Asked.stream_of(query, documents, options))

    def astream(
        self, query: str, documents: Iterable[Document], **options: Unpack[RequestKeywords]
    ) -> AsyncScoreStream:
        """``stream`` for asyncio, to be used with ``async for``; ``aclose()`` closes it.

        Arguments are checked, and the timeout begins, with this call. The request is submitted when the first item is
        asked for, without holding up the loop. Leaving the ``async for`` early, or cancelling the task, cancels the
        rest.
        """
        return self._astream(Asked.stream_of(query, documents, options))

    # What a class has to do with a request.

    @abstractmethod
    def _submit(self, asked: Asked) -> Future[Any]:
        """Hand a request over, once there is room for it; its future."""

    @abstractmethod
    def _result(self, asked: Asked) -> Any:
        """Hand a request over and wait for its result. Interrupted, cancel it."""

    @abstractmethod
    async def _awaited(self, asked: Asked) -> Any:
        """Hand a request over and wait for its result, on no thread. Cancelled, cancel it."""

    @abstractmethod
    def _stream(self, asked: Asked) -> ScoreStream:
        """Hand a request over, once there is room for it; its scores as they come."""

    @abstractmethod
    def _astream(self, asked: Asked) -> AsyncScoreStream:
        """Hand a request over as the first score is asked for; its scores as they come, on no thread."""

    def _score_pairs(self, pairs: Iterable[Sequence[str]], **options: Unpack[RequestKeywords]) -> Scores:
        scores: Scores = self._result(Asked.scores_of(pairs, options))
        return scores
