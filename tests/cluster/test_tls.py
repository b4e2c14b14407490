"""Encrypted and authenticated: Dask's own TLS, with certificates made for the test."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import PATIENCE, Processes, need_dask
from conftest import ranked

from mp_rerank import ClusterError, RerankerPool
from mp_rerank.config import ClusterAddress

MakePool = Callable[..., RerankerPool]
DOCUMENTS = [f"document {i}" for i in range(200)]


def certificate(folder: Path, name: str) -> dict[str, str]:
    """A certificate that is its own authority, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-out", str(cert), "-keyout", str(key)),
        ],
        check=True,
        capture_output=True,
    )
    return {"ca": str(cert), "cert": str(cert), "key": str(key)}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Processes]:
    need_dask()
    ours = certificate(tmp_path, "ours")
    files = ["--tls-ca-file", ours["ca"], "--tls-cert", ours["cert"], "--tls-key", ours["key"]]
    cluster = Processes(tmp_path, arguments=files, protocol="tls")
    cluster.worker("--protocol", "tls")
    yield cluster
    cluster.close()


def security(files: dict[str, str]) -> Any:
    from distributed import Security

    return Security(
        tls_ca_file=files["ca"], tls_client_cert=files["cert"], tls_client_key=files["key"], require_encryption=True
    )


def test_a_client_with_the_certificate_is_let_in_and_others_are_not(
    make_pool: MakePool, cluster: Processes, tmp_path: Path
) -> None:
    from distributed import Client

    assert cluster.address.startswith("tls://")
    ours = security({"ca": f"{tmp_path}/ours.pem", "cert": f"{tmp_path}/ours.pem", "key": f"{tmp_path}/ours.key"})
    with Client(cluster.address, security=ours) as client, make_pool(cluster=client) as pool:
        assert pool.submit("query", DOCUMENTS).result(PATIENCE) == ranked("query", DOCUMENTS)
    stranger = security(certificate(tmp_path, "stranger"))
    with pytest.raises(ClusterError, match="no scheduler answers"):
        make_pool(cluster=ClusterAddress(cluster.address, stranger), cluster_timeout=2.0).start()
    with pytest.raises(ClusterError, match="no scheduler answers"):
        make_pool(cluster=cluster.address.replace("tls://", "tcp://"), cluster_timeout=2.0).start()
