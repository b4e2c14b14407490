"""Metrics for Prometheus: what the server counts itself, and what its pools say when they are asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

import mp_rerank
from mp_rerank.results import PoolStats
from mp_rerank.server.limits import Places
from mp_rerank.server.models import Models, ServedModel

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
SLICE_SIZES = tuple(2**n for n in range(11))

# Counters of `PoolStats`: the metric, and what it is.
OF_STATS = {
    "submitted": ("requests_submitted", "Requests that the pool took."),
    "scored_pairs": ("pairs_scored", "Pairs that workers scored."),
    "scored_tokens": ("tokens_scored", "Tokens that models read of the pairs that workers scored."),
    "coalesced_pairs": ("pairs_coalesced", "Pairs that got their score together with an equal one."),
    "cached_pairs": ("pairs_cached", "Pairs whose score had been kept."),
    "slices": ("slices_scored", "Slices that workers scored: what one is given at a time."),
    "busy_seconds": ("worker_busy_seconds", "Time that workers spent scoring, summed over them."),
    "restarts": ("worker_restarts", "Workers started to replace another."),
}


class Metrics:
    """All metrics of one server."""

    def __init__(self, models: Models, places: Places) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mp_rerank_http_requests",
            "Requests that ended, by their dialect, how, and how their caller was known.",
            ["dialect", "outcome", "caller"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "mp_rerank_http_request_seconds",
            "Time from a request's headers to its answer.",
            ["dialect"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.wait_seconds = Histogram(
            "mp_rerank_wait_seconds",
            "Time until a worker began with a request, of requests that were scored.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.score_seconds = Histogram(
            "mp_rerank_score_seconds",
            "Time from then until its last score was there.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.pairs = Histogram(
            "mp_rerank_http_request_pairs",
            "Pairs of a request, of requests that were scored.",
            ["model"],
            buckets=SIZES,
            registry=self.registry,
        )
        in_flight = Gauge("mp_rerank_http_requests_in_flight", "Requests now.", registry=self.registry)
        in_flight.set_function(lambda: places.taken)
        info = Gauge("mp_rerank_info", "1, with the version.", ["version"], registry=self.registry)
        info.labels(mp_rerank.__version__).set(1)
        self.registry.register(_OfPools(models))
        ProcessCollector(registry=self.registry)

    def exposition(self) -> bytes:
        """All of it, as Prometheus reads it. Asks the system for the memory of each worker: for another thread."""
        exposition: bytes = generate_latest(self.registry)
        return exposition


class _OfPools(Collector):
    """What the pools say at the moment of asking. Counters begin anew where a model is loaded again."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> Iterator[Metric]:
        return iter(())  # or the registry would collect to find out

    def collect(self) -> Iterator[Metric]:
        models = list(self._models)
        stats = {model.name: model.pool.stats() for model in models}
        for field, (name, about) in OF_STATS.items():
            counter = CounterMetricFamily(f"mp_rerank_{name}", about, labels=["model"])
            for model, of_model in stats.items():
                counter.add_metric([model], getattr(of_model, field))
            yield counter
        yield from self._requests(stats)
        yield self._exits(stats)
        yield self._slices(stats)
        yield from self._workers(models)

    def _requests(self, stats: dict[str, PoolStats]) -> Iterator[Metric]:
        ended = CounterMetricFamily(
            "mp_rerank_requests_ended", "Requests of the pool that ended, by how.", labels=["model", "outcome"]
        )
        waiting = GaugeMetricFamily("mp_rerank_pending_pairs", "Pairs neither scored nor dropped.", labels=["model"])
        pending = GaugeMetricFamily("mp_rerank_pending_requests", "Requests not finished.", labels=["model"])
        callers = GaugeMetricFamily("mp_rerank_callers_pending", "Callers that have a request.", labels=["model"])
        for model, of_model in stats.items():
            for outcome in ("completed", "failed", "cancelled", "timed_out"):
                ended.add_metric([model, outcome], getattr(of_model, outcome))
            waiting.add_metric([model], of_model.pending_pairs)
            pending.add_metric([model], of_model.pending_requests)
            callers.add_metric([model], sum(bool(caller.pending_requests) for caller in of_model.callers.values()))
        yield from (ended, waiting, pending, callers)

    def _exits(self, stats: dict[str, PoolStats]) -> Metric:
        exits = CounterMetricFamily("mp_rerank_worker_exits", "Workers that ended, by why.", labels=["model", "reason"])
        for model, of_model in stats.items():
            for reason, count in of_model.exits.items():
                exits.add_metric([model, reason], count)
        return exits

    def _slices(self, stats: dict[str, PoolStats]) -> Metric:
        sizes = HistogramMetricFamily("mp_rerank_slice_pairs", "Pairs of a slice.", labels=["model"])
        for model, of_model in stats.items():
            counts = of_model.slice_sizes
            buckets: list[tuple[str, float]] = [
                (str(float(most)), sum(count for size, count in counts.items() if size <= most)) for most in SLICE_SIZES
            ]
            buckets.append(("+Inf", of_model.slices))
            sizes.add_metric([model], buckets, sum_value=of_model.scored_pairs)
        return sizes

    def _workers(self, models: list[ServedModel]) -> Iterator[Metric]:
        states = GaugeMetricFamily("mp_rerank_workers", "Seats, by their state.", labels=["model", "state"])
        resident = GaugeMetricFamily(
            "mp_rerank_worker_resident_bytes",
            "Resident memory of a worker, pages that several share included.",
            labels=["model", "slot"],
        )
        for model in models:
            workers = model.pool.workers()
            found = [worker.state for worker in workers]
            for state in ("starting", "ready", "draining", "restarting", "resting", "failed", "closed"):
                states.add_metric([model.name, state], found.count(state))
            slots = {worker.pid: str(worker.slot) for worker in workers}
            for memory in model.pool.memory().workers:
                resident.add_metric([model.name, slots.get(memory.pid, "")], memory.rss)
        yield from (states, resident)
