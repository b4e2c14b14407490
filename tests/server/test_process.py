"""The process: ``mp-rerank serve`` from its start to its end."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import PATIENCE, Fifo, until
from serving import ServerProcess, server_process, serving

from mp_rerank import ModelSpec, TextTooLongError, connect
from mp_rerank.cli import main


def refuses(url: str) -> bool:
    """Whether nobody listens there."""
    parts = httpx.URL(url)
    with socket.socket() as sock:
        return sock.connect_ex((parts.host, parts.port)) != 0


def test_sigterm_takes_no_more_and_finishes_what_is_there(fifo: Fifo) -> None:
    with server_process() as server, ThreadPoolExecutor(1) as threads:
        server.wait_for("(ready)")
        workers = psutil.Process(server.process.pid).children(recursive=True)
        said = {"query": "query", "documents": [fifo.order, "document"]}
        idle = httpx.Client(base_url=server.url)
        assert idle.get("/ready").status_code == 200
        pending = threads.submit(httpx.post, f"{server.url}/rerank", json=said, timeout=PATIENCE)
        fifo.wait_until_read()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server.url))
        assert not pending.done()
        fifo.release()
        assert len(pending.result(PATIENCE).json()["results"]) == 2
        assert server.end() == 0
        idle.close()
        assert psutil.wait_procs(workers, PATIENCE)[1] == []
        assert "Traceback" not in "".join(server.lines)


def test_a_second_sigterm_ends_at_once(fifo: Fifo) -> None:
    with server_process() as server, ThreadPoolExecutor(1) as threads:
        server.wait_for("(ready)")
        workers = psutil.Process(server.process.pid).children(recursive=True)
        said = {"query": "query", "documents": [fifo.order]}
        pending = threads.submit(httpx.post, f"{server.url}/rerank", json=said, timeout=PATIENCE)
        fifo.wait_until_read()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server.url))  # two signals that come at once are one
        server.process.send_signal(signal.SIGTERM)
        server.end()
        assert isinstance(pending.exception(PATIENCE), httpx.TransportError) or pending.result().status_code >= 500
        assert psutil.wait_procs(workers, PATIENCE)[1] == []
        fifo.release()


def test_sigterm_while_it_loads(fifo: Fifo) -> None:
    with server_process(fifo.order, "fakes:load_after_gate") as server:
        fifo.wait_until_read()
        assert httpx.get(f"{server.url}/ready").status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        fifo.release()


def test_a_model_that_cannot_be_loaded_ends_it() -> None:
    with server_process("!raise no such weights", "fakes:load_obeying") as server:
        assert server.end() == 1
        server._rest.join(PATIENCE)
        said = "".join(server.lines[-2:])  # after the error, what it means
        assert "ModelLoadError" in said
        assert "no such weights" in said


def test_sighup_reads_the_keys_again(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice one\n")
    with server_process(keys=str(file)) as server:
        server.wait_for("(ready)")

        def status(key: str) -> int:
            return httpx.get(f"{server.url}/models", headers={"authorization": f"Bearer {key}"}).status_code

        assert (status("one"), status("two")) == (200, 401)
        file.write_text("alice two\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("(API keys read)")
        assert (status("one"), status("two")) == (401, 200)
        file.write_text("")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("(stay as they were)")
        assert status("two") == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_sigusr1_loads_the_models_anew(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with server_process(str(folder), "fakes:load_from_folder") as server, connect(server.url) as pool:
        server.wait_for("(ready)")
        before = {worker.pid for worker in pool.workers()}
        scores = pool.rerank("query", ["a", "b"])
        server.process.send_signal(signal.SIGUSR1)
        server.wait_for("(is loaded anew)")
        assert pool.stats().reloads == 1
        after = {worker.pid for worker in pool.workers()}
        assert not before & after
        (folder / "config.json").unlink()
        server.process.send_signal(signal.SIGUSR1)
        server.wait_for("(stays as it was)")
        assert {worker.pid for worker in pool.workers()} == after
        assert pool.rerank("query", ["a", "b"]) == scores
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_a_unit_of_type_notify_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        with server_process() as server:
            assert systemd.recv(100) == b"READY=1"
            server.process.send_signal(signal.SIGTERM)
            assert systemd.recv(100) == b"STOPPING=1"
            assert server.end() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--alias", "a"], "--alias: NAME=MODEL is needed"),
        (["--alias", "a=b"], "--alias: 'b' is none of the models"),
        (["--model", "/nowhere"], "there is no folder '/nowhere'"),
        (["--model", "builtin", "--model", "builtin"], "--model: two of these"),
        (["--uds-mode", "999"], "--uds-mode: an octal number"),
        (["--api-key-file", "/nowhere"], "--api-key-file: /nowhere cannot be read"),
        (["--max-documents", "0"], "documents: at least 1 is needed"),
        (["--memory", "much"], "memory: bytes, or a size"),
    ],
)
def test_a_mistake_in_the_call_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", "--port", str(other.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err


def _check_options(url: str) -> None:
    """How long documents are read, in the words of each dialect."""
    query, long = "how do birds fly?", "Bread is baked. " * 300 + "Birds fly because their wings give lift."
    texts = ["Water is wet.", long]
    refused = httpx.post(f"{url}/rerank", json={"query": query, "texts": texts, "truncate": False})
    assert (refused.status_code, refused.json()["error_type"]) == (413, "Validation")
    for said in ({"truncation_direction": "Left"}, {"long_documents": "chunk"}):
        ranks = httpx.post(f"{url}/rerank", json={"query": query, "texts": texts, **said}, timeout=PATIENCE)
        assert ranks.json()[0]["index"] == 1
    short = httpx.post(f"{url}/v2/rerank", json={"query": query, "documents": texts, "max_tokens_per_doc": 4})
    assert short.json()["meta"]["tokens"]["input_tokens"] < 40
    assert int(short.headers["x-compute-tokens"]) == short.json()["meta"]["tokens"]["input_tokens"]
    with connect(url) as pool:
        best = pool.rerank(query, texts, long_documents="chunk")[0]
        assert best.passage is not None
        assert "wings" in long[slice(*best.passage)]
        assert best.tokens > 512  # type: ignore[operator]
        with pytest.raises(TextTooLongError) as caught:
            pool.rerank(query, texts, truncation="error")
        assert caught.value.document_index == 1


@pytest.mark.real
def test_the_built_in_model_and_no_torch_in_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mp_rerank.cli", "serve", "--port", "0", "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            server = ServerProcess(process)
            server.wait_for("(ready)")
            texts = ["Bread is baked.", "Birds fly because their wings give lift."]
            for raw in (False, True):
                said = {"query": "how do birds fly?", "texts": texts, "raw_scores": raw}
                answer = httpx.post(f"{server.url}/rerank", json=said, timeout=PATIENCE)
                assert int(answer.headers["x-tokenization-time"]) <= int(answer.headers["x-inference-time"])
                ranks = answer.json()
                assert [rank["index"] for rank in ranks] == [1, 0]
                assert all(0 < rank["score"] < 1 for rank in ranks) is not raw
            _check_options(server.url)
            mapped = psutil.Process(process.pid).memory_maps()
            assert not any("libtorch" in found.path for found in mapped)
            process.send_signal(signal.SIGTERM)
            assert server.end() == 0
        finally:
            process.kill()


def test_top_shows_it_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"fake": ModelSpec("fake", loader="fakes:load")}) as server:
        httpx.post(f"{server.url}/rerank", json={"query": "q", "documents": ["d"]}, headers={"x-caller": "me"})
        assert main(["top", server.url]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"ready, up 0 min\nrequests/s \d", shown)
        assert re.search(r"^fake +0 ready +cpu +\d+ +\d+ MiB", shown, re.MULTILINE)
        assert re.search(r"^header:me +0 +0 +1 +0", shown, re.MULTILINE)
        assert main(["top", server.url, "--json"]) == 0
        assert '"ready": true' in capsys.readouterr().out
    assert main(["top", server.url]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert main(["top", "localhost"]) == 2
