"""The ways to a cluster: the command, the example, a Dask client; with seats that come and go."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import CLUSTER_MARK, PATIENCE, ROOT, Processes, need_dask
from conftest import ranked, until

from mp_rerank import ModelPools, ModelSpec, RerankerPool

MakePool = Callable[..., RerankerPool]
DOCUMENTS = [f"document {i}" for i in range(200)]


def test_a_cluster_is_an_address_or_what_has_one(make_pool: MakePool) -> None:
    need_dask()
    for wrong in (8786, "", object()):
        with pytest.raises(TypeError, match="cluster: the address of a Dask scheduler, or a Dask Client, is needed"):
            make_pool(cluster=wrong)
    with pytest.raises(ValueError, match="cluster: this one has no processes"):
        make_pool(cluster="inproc://10.0.0.1/1/1")
    with pytest.raises(ValueError, match="cluster: ModelPools keep models within a bound on this machine's memory"):
        ModelPools("1GiB").pool("builtin", cluster="tcp://10.0.0.1:8786")
    pool = make_pool(cluster="tcp://10.0.0.1:8786")
    assert "10.0.0.1:8786" in " ".join(pool.plan.reasons)


def test_a_client_and_its_own_cluster_will_do(make_pool: MakePool) -> None:
    need_dask()
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=3, dashboard_address=":0") as cluster:
        with Client(cluster) as client, make_pool(cluster=client) as pool:
            assert pool.submit("query", DOCUMENTS).result(PATIENCE) == ranked("query", DOCUMENTS)
            assert [info.threads for info in pool.workers()] == [3]
            assert client.submit(sum, [1, 2]).result() == 3  # the cluster is still for other things too
        with make_pool(cluster=cluster, threads_per_worker=1) as pool:
            assert [info.threads for info in pool.workers()] == [1]


def test_adaptive_scaling_follows_what_is_pending_as_the_page_has_it(make_pool: MakePool, tmp_path: Path) -> None:
    need_dask()
    from distributed import LocalCluster

    page = (ROOT / "docs" / "cluster.md").read_text()
    [block] = [block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "(Adaptive)" in block]
    gate = tmp_path / "gate"
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        make_pool(ModelSpec(str(gate), loader="fakes:load_gated"), cluster=cluster, cluster_timeout=20.0) as pool,
    ):
        gate.touch()  # from here on no worker scores, and a new one is proved once it is open
        future = pool.submit("query", [f"document {i}" for i in range(4_000)])
        exec(block, {"pool": pool, "cluster": cluster})
        until(lambda: len(pool.workers()) == 2)  # the block asks for one for each 2,000 pairs
        gate.unlink()
        assert len(future.result(PATIENCE)) == 4_000
        until(lambda: len(pool.workers()) == 1)
        assert len(pool.rerank("query", ["document"])) == 1
        assert pool.stats().failed == 0


def test_nodes_reached_over_ssh(make_pool: MakePool, tmp_path: Path) -> None:
    """`SSHCluster`, as the page has it; both nodes are this machine, by way of a real server of the protocol."""
    need_dask()
    if os.environ.get("MP_RERANK_CLUSTER") != "required":
        pytest.importorskip("asyncssh")
    import asyncssh
    from distributed import SSHCluster

    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(tmp_path / "key")
    key.write_public_key(tmp_path / "key.pub")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ssh_server.py")), str(tmp_path / "key.pub")],
        env={**os.environ, "PYTHONPATH": path, CLUSTER_MARK: "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stdin is not None
        assert server.stdout is not None
        login = {"port": int(server.stdout.readline()), "known_hosts": None, "client_keys": [str(tmp_path / "key")]}
        with (
            SSHCluster(
                ["127.0.0.1"] * 3,
                connect_options=login,
                worker_options={"n_workers": 1, "nthreads": 1},
                scheduler_options={"dashboard": False},
                remote_python=sys.executable,
            ) as cluster,
            make_pool(cluster=cluster) as pool,
        ):
            until(lambda: [info.state for info in pool.workers()] == ["ready"] * 2)
            assert pool.submit("query", DOCUMENTS).result(PATIENCE) == ranked("query", DOCUMENTS)
        server.stdin.close()


def test_the_callers_process_imports_no_torch(tmp_path: Path, dask_clusters: dict[int, str]) -> None:
    code = (
        "import sys; from mp_rerank import ModelSpec, RerankerPool\n"
        "with RerankerPool(ModelSpec('fake', loader='fakes:load'), cluster=sys.argv[1]) as pool:\n"
        "    print(len(pool.rerank('query', ['document'])), 'torch' in sys.modules, 'tornado' in sys.modules)\n"
        "    print(sorted({'mp_rerank._engine', 'transformers'} & set(sys.modules)))\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, dask_clusters[2]],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.stderr) == ("1 False True\n[]\n", "")


@pytest.fixture(scope="module")
def real_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    need_dask()
    cluster = Processes(tmp_path_factory.mktemp("real"))
    cluster.worker("--nworkers", "2")
    cluster.wait_for(2)
    yield cluster
    cluster.close()


@pytest.mark.real
def test_a_real_models_scores_are_those_of_a_pool_here(make_pool: MakePool, real_cluster: Processes) -> None:
    documents = (ROOT / "examples" / "berlin.txt").read_text().splitlines()
    pairs = [("Where was currywurst invented?", document) for document in documents]
    with make_pool("builtin", cluster=real_cluster.address, cluster_timeout=PATIENCE) as remote:
        scores = remote.submit_pairs(pairs).result(PATIENCE)
        until(lambda: len(remote.workers()) == 2)
    with make_pool("builtin", workers=1, threads_per_worker=1) as local:
        np.testing.assert_allclose(scores, local.submit_pairs(pairs).result(PATIENCE), rtol=1e-5, atol=1e-5)


@pytest.mark.real
def test_a_whole_run_is_scored_in_a_cluster_and_goes_on_after_it_was_ended(
    real_cluster: Processes, tmp_path: Path
) -> None:
    files: dict[str, Any] = {name: tmp_path / name for name in ("queries", "corpus", "first", "out")}
    files["queries"].write_text("".join(f"q{i}\tquery {i}\n" for i in range(6)))
    files["corpus"].write_text("".join(f"d{i}\ttext of document {i}\n" for i in range(10)))
    files["first"].write_text("".join(f"q{i} Q0 d{j} {j + 1} {-j} x\n" for i in range(6) for j in range(10)))

    def run() -> str:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "mp_rerank.cli", "run", "--cluster", real_cluster.address),
                *(f"--queries={files['queries']}", f"--corpus={files['corpus']}"),
                *(f"--run={files['first']}", f"--output={files['out']}"),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "6 queries, 60 pairs" in run()
    whole = files["out"].read_text()
    files["out"].write_text(whole[: len(whole) // 2])
    assert "were there already" in run()
    assert [line.split()[:4] for line in files["out"].read_text().splitlines()] == [
        line.split()[:4] for line in whole.splitlines()
    ]


@pytest.mark.real
def test_the_example_runs() -> None:
    need_dask()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "dask_cluster.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "Currywurst was invented in Berlin in 1949" in lines[1]
    assert lines[-1] == "21 requests answered, 0 failed"
