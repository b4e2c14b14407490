"""What workers say reaches the parent's logging, with the worker named; the terminal hears nothing from them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE

from mp_rerank import RerankerPool
from mp_rerank._workers.logs import WORKER_LOGGER

MakePool = Callable[..., RerankerPool]


def test_logs_warnings_and_prints_arrive_under_the_worker_s_name(
    make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=WORKER_LOGGER), make_pool(workers=1) as pool:
        pool.rerank("query", ["!say hello"])
    records = [record for record in caplog.records if record.name == WORKER_LOGGER]
    said = {record.getMessage(): record.levelno for record in records}
    assert {record.processName for record in records} == {"mp_rerank-0.1"}
    assert said["mp_rerank-0.1: fake.model: logged hello"] == logging.WARNING
    assert said["mp_rerank-0.1: output: printed hello"] == logging.INFO
    [warned] = [message for message in said if "warned hello" in message]
    assert warned.startswith("mp_rerank-0.1: py.warnings: ")


def test_escapes_and_newlines_of_foreign_text_are_shown_and_not_obeyed(
    make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=WORKER_LOGGER), make_pool(workers=1) as pool:
        pool.rerank("query", ["!say \x1b[31mred\nERROR forged"])
    said = [record.getMessage() for record in caplog.records if record.name == WORKER_LOGGER]
    assert r"mp_rerank-0.1: fake.model: logged \x1b[31mred\nERROR forged" in said
    assert not any("\x1b" in text for text in said)


def test_a_worker_sends_only_what_the_parent_would_hear(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger=WORKER_LOGGER), make_pool(workers=1) as pool:
        pool.rerank("query", ["!say hello"])
    assert [record for record in caplog.records if record.name == WORKER_LOGGER] == []


def test_nothing_a_worker_writes_reaches_the_terminal(tmp_path: Path) -> None:
    program = """
import logging
logging.getLogger("mp_rerank").addHandler(logging.NullHandler())
from mp_rerank import ModelSpec, RerankerPool
with RerankerPool(ModelSpec("!say loading", loader="fakes:load_obeying"), devices="cpu", workers=1) as pool:
    pool.rerank("query", ["!say scoring"])
"""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_is_made_between_two_records_and_not_while_one_is_written() -> None:
    """Else the fork has the lock of a stream that nobody will let go, and hangs as it exits."""
    program = """
import logging, os, sys, warnings
warnings.simplefilter("ignore")
from mp_rerank._workers import logs
writing, seen = [], []
class Handler(logging.Handler):
    def emit(self, record):
        writing.append(1)
        os.write(2, b"x" * 1000)
        writing.pop()
logging.getLogger("mp_rerank.pool").addHandler(Handler())
logger = logs.QueuedLogger("mp_rerank.pool")
for i in range(300):
    for _ in range(5):
        logger.warning("record")
    pid = os.fork()
    if pid == 0:
        os._exit(len(writing))
    seen.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(set(seen))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout == "{0}\n"
