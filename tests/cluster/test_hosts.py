"""A cluster over three hosts and a network that delays, loses and is cut (network namespaces; see ``hosts.py``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clusters import PATIENCE, Processes, need_dask
from conftest import ranked, until
from hosts import Network, need_hosts

from mp_rerank import RerankerPool

MakePool = Callable[..., RerankerPool]
# Tests that run side by side (pytest-xdist) have networks of their own.
NUMBER = 2 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
DOCUMENTS = [f"document {i}" for i in range(200)]


@pytest.fixture
def network() -> Iterator[Network]:
    need_dask()
    need_hosts()
    network = Network(NUMBER, ["head", "one", "two"])
    yield network
    network.close()


@pytest.fixture
def cluster(tmp_path: Path, network: Network) -> Iterator[Processes]:
    """A scheduler on one host, and a worker on each of two others."""
    cluster = Processes(tmp_path, inside=network.inside("head"), host=network.addresses["head"])
    for host in ("one", "two"):
        cluster.worker("--name", host, inside=network.inside(host), host=network.addresses[host])
    cluster.wait_for(2)
    yield cluster
    cluster.close()


def places(pool: RerankerPool) -> list[str]:
    return [info.place for info in pool.workers() if info.state == "ready"]


def check(pool: RerankerPool, requests: int = 20) -> None:
    futures = [pool.submit(f"query {i}", DOCUMENTS) for i in range(requests)]
    assert [f.result(PATIENCE) for f in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(requests)]


def test_delay_and_loss_cost_time_only(make_pool: MakePool, network: Network, cluster: Processes) -> None:
    network.delay, network.loss = 0.005, 0.01
    with make_pool(cluster=cluster.address, cluster_timeout=20.0) as pool:
        check(pool)
        assert pool.stats().crashes == 0


def test_a_host_that_dies_takes_its_seat_along(make_pool: MakePool, network: Network, cluster: Processes) -> None:
    with make_pool(cluster=cluster.address, cluster_timeout=3.0) as pool:
        until(lambda: len(places(pool)) == 2)
        futures = [pool.submit(f"query {i}", DOCUMENTS) for i in range(20)]
        network.away.add("one")  # it says nothing any more, not even that its connections have ended
        assert [f.result(PATIENCE) for f in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(20)]
        check(pool)
        until(lambda: len(pool.workers()) == 1)
        check(pool)


def test_a_host_that_was_cut_off_has_its_seat_again(make_pool: MakePool, network: Network, cluster: Processes) -> None:
    with make_pool(cluster=cluster.address, cluster_timeout=3.0) as pool:
        until(lambda: len(places(pool)) == 2)
        network.away.add("one")
        check(pool)
        until(lambda: len(pool.workers()) == 1)
        network.away.clear()
        until(lambda: len(places(pool)) == 2)
        check(pool)


def test_workers_behind_the_scheduler_are_reached_through_it(
    make_pool: MakePool, network: Network, tmp_path: Path
) -> None:
    behind = Network(NUMBER + 1, ["inner"])
    cluster = None
    try:
        # The scheduler's host is on both networks; this process is on the first only.
        behind.move("", network.namespaces["head"])
        cluster = Processes(tmp_path, inside=network.inside("head"), host="0.0.0.0", port=8786)
        cluster.address = f"tcp://{network.addresses['head']}:8786"
        inner = {"inside": behind.inside("inner"), "host": behind.addresses["inner"]}
        cluster.worker(**inner, scheduler=f"tcp://{behind.addresses['']}:8786")
        cluster.wait_for(1)
        with make_pool(cluster=cluster.address, cluster_timeout=20.0) as pool:
            check(pool)
            assert pool.stats().crashes == 0
    finally:
        if cluster is not None:
            cluster.close()
        behind.close()
