"""The command, as a shell user meets it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import psutil
import pytest
from conftest import PATIENCE
from fakes import score_of

from mp_rerank import ModelSpec, RerankerPool, __version__, cli
from mp_rerank._planning.plan import Plan, Seat
from mp_rerank.cli import rank
from mp_rerank.cli.documents import Document, read_documents

MakePool = Callable[..., RerankerPool]
ROOT = Path(__file__).parents[2]
BERLIN = ROOT / "examples" / "berlin.txt"
COMMAND = [sys.executable, "-m", "mp_rerank.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}


def mp_rerank(
    *arguments: str, text: str | None = None, command: list[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], env=ENVIRONMENT, input=text, capture_output=True, text=True, timeout=2 * PATIENCE
    )


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        (["rank", "q", "missing.txt"], None, "missing.txt: No such file or directory"),
        (["rank", "q", "."], None, ".: Is a directory"),
        (["rank", "q"], "", "standard input: there are no documents in it"),
        (["rank", "q", "--format", "jsonl"], '"a"\n\n{"text": ', "standard input, line 3: not JSON: Expecting value"),
        (
            ["rank", "q", "--format", "jsonl"],
            '{"body": "a"}',
            "line 1: neither a string nor an object with a string as",
        ),
        (["rank", "q", "--top-n", "-1"], "a", "--top-n: at least 0 is needed, not -1"),
        (["rank", "q", "--devices", "gpu"], "a", "devices: unknown device 'gpu'"),
        (["rank", "q", "--workers", "0"], "a", "workers: at least 1 is needed, not 0"),
        (["rank", "q", "--model", "./nothing"], "a", "model: there is no folder './nothing'"),
        (["rank", "q", "--dtype", "int3"], "a", "dtype: one of"),
        (["tune", "--seconds", "0"], None, "--seconds: more than 0 are needed, not 0"),
        (["tune", "--words", "60", "0"], None, "--words: at least 1 is needed, not 0"),
        (["tune", "--dtypes", "int3"], None, "dtype: one of"),
        (["tune", "--corpus", "missing.txt"], None, "missing.txt: No such file or directory"),
        (["rank", "q", "--dtype", "int8"], "a", "(that is for backend='onnx' and backend='openvino')"),
        (["rank", "q", "--backend", "jax"], "a", "backend: one of torch, onnx, openvino is needed, not 'jax'"),
        (["plan", "--devices", "gpu"], None, "devices: unknown device 'gpu'"),
        (["rank", "q", "--top-n", "1", "missing.txt"], None, "missing.txt: No such file or directory"),
        (["rank", "--top-n", "1", "q", "--json", "missing.txt"], None, "missing.txt: No such file or directory"),
        (["rank", "q", "missing\x1b[2J.txt"], None, "missing\\x1b[2J.txt: No such file or directory"),
        (["rank", "q", "--format", "jsonl"], "[" * 100_000, "line 1: JSON that is nested too deep"),
        (["tune", "--seconds", "nan"], None, "--seconds: more than 0 are needed, not nan"),
        (["rank", "q", "--max-tokens-per-doc", "0"], None, "--max-tokens-per-doc: at least 1"),
        (["rank", "q", "--instruction", "a", "--prompt-name", "b"], None, "a request has one of the two"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], text: str | None, words: str) -> None:
    done = mp_rerank(*arguments, text=text)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("mp-rerank: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


ORDERS = [
    ["QUERY", "FILE", "--top-n", "1"],
    ["QUERY", "--top-n", "1", "FILE"],
    ["--top-n", "1", "QUERY", "FILE"],
    ["--top-n=1", "--json", "QUERY", "-v", "FILE", "--workers", "2"],
    ["--top-n=1", "QUERY", "--", "FILE"],
    ["--top-n=1", "--", "QUERY", "FILE"],
]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_options_go_anywhere(order: list[str]) -> None:
    arguments = cli._parse(["rank", *order])
    assert (arguments.query, arguments.file, arguments.top_n) == ("QUERY", "FILE", 1)


def test_what_a_command_does_not_know_is_a_usage_error() -> None:
    for arguments in (["rank"], ["rank", "q", "f", "more"], ["rank", "q", "--topn", "1"], ["run"], ["nothing"], []):
        done = mp_rerank(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("usage: mp-rerank")
    assert mp_rerank("rank", "--help").stdout.startswith("usage: mp-rerank rank ")
    assert mp_rerank("--version").stdout == f"mp-rerank {__version__}\n"


STREAMS = [
    (["rank", "q"], "<&-", 2, "standard input is closed: name a FILE"),
    (["plan", "--devices=cpu"], ">/dev/full", 1, "standard output: No space left on device"),
    (["plan", "--devices=cpu", "--json"], ">/dev/full", 1, "standard output: No space left on device"),
    (["plan", "--help"], ">/dev/full", 1, "standard output: No space left on device"),
    (["plan", "--devices=cpu"], ">&-", 1, "standard output is closed"),
    (["rank", "q"], ">&-", 1, "standard output is closed"),
    (["rank", "q"], "<&- >&-", 1, "standard output is closed"),
    (["rank", "q", "missing.txt"], "2>&-", 2, ""),
    (["plan", "--devices=cpu"], "<&- 2>&-", 0, ""),
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize(("arguments", "redirections", "code", "words"), STREAMS)
def test_a_stream_that_is_closed_or_full_is_one_line(
    arguments: list[str], redirections: str, code: int, words: str
) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirections}', "sh", *COMMAND, *arguments],
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": ""},  # which would have argparse hide what becomes of --help
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert (done.returncode, done.stderr) == (code, f"mp-rerank: error: {words}\n" if words else "")


def test_workers_start_where_standard_output_is_closed(tmp_path: Path) -> None:
    files = {"queries": "q\tbread\n", "corpus": "d\tBread is baked.\n", "run": "q Q0 d 1 1 bm25\n"}
    options = [f"--output={tmp_path / 'out'}", "--devices=cpu", "--workers=1"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        options.append(f"--{name}={tmp_path / name}")
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *fakes.COMMAND, "run", *options],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text().startswith("q Q0 d 1 ")


def rank_with_fake(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> int:
    spec = ModelSpec("fake", loader="fakes:load_with_nan")
    monkeypatch.setattr(
        cli.rank, "pool_of", lambda arguments, _: make_pool(spec, isolation="thread", nan_scores="none")
    )
    return cli.main(["rank", "q", *options, str(path)])


def test_json_has_no_number_that_json_does_not_know_and_nothing_a_terminal_obeys(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["!nan", "a\x1b[2J\x9b \ud83d é"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t, "n": math.inf}) + "\n" for t in texts))
    assert rank_with_fake(make_pool, monkeypatch, tmp_path / "in.jsonl", "--json") == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x9b" not in printed
    assert "é" in printed
    first, last = json.loads(printed, parse_constant=pytest.fail)
    assert (first["document"], first["record"]["n"]) == (texts[1], None)
    assert (last["document"], last["relevance_score"]) == ("!nan", None)


def test_a_table_has_a_line_for_each_document_and_nothing_a_terminal_obeys(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("a\x1b[2Jb \u202e c\n!nan\n")
    assert rank_with_fake(make_pool, monkeypatch, tmp_path / "in.txt") == 0
    _, first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("  a\\x1b[2Jb \\u202e c")
    assert last.split() == ["2", "nan", "!nan"]


def test_options_of_a_request_and_a_passage(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ModelSpec("fake", loader="fakes:load_reading", max_length=8)
    monkeypatch.setattr(cli.rank, "pool_of", lambda arguments, _: make_pool(spec, isolation="thread"))
    (tmp_path / "in.txt").write_text("a b c d e f g h i j k l\nshort\n")
    command = ["rank", "q", str(tmp_path / "in.txt"), "--long-documents", "chunk", "--instruction", "two words "]
    assert cli.main([*command, "--show-passage"]) == 0
    printed = capsys.readouterr().out
    parts = ["a b c d e", "f g h i j", "k l"]
    best = max(parts, key=lambda part: score_of("two words q", part))
    start = "a b c d e f g h i j k l".index(best)
    assert f"  [{start}:{start + len(best)}] {best}\n" in printed
    assert cli.main([*command, "--json", "--min-score", str(score_of("two words q", best))]) == 0
    shown = {document["index"]: document for document in json.loads(capsys.readouterr().out)}
    assert shown[0]["passage"] == {"start": start, "end": start + len(best), "text": best}
    assert shown[0]["relevance_score"] == score_of("two words q", best)
    assert (shown[0]["tokens"], shown[0]["truncated"]) == (12 + 3 * 3, False)
    assert (1 in shown) == (score_of("two words q", "short") >= score_of("two words q", best))


def test_a_run_with_documents_that_cannot_be_scored_says_so_and_ends_with_3(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.run, "pool_of", lambda arguments, spec: make_pool(isolation="thread"))
    files = {"queries": "q\tquery\n", "corpus": "d1\t!raise odd\nd2\ttext\n", "run": "q Q0 d1 1 2 t\nq Q0 d2 2 1 t\n"}
    options = [f"--output={tmp_path / 'out'}", "--json"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        options.append(f"--{name}={tmp_path / name}")
    assert cli.main(["run", *options]) == 3
    printed = capsys.readouterr()
    assert "; 1 pairs of 1 queries could not be scored" in printed.err
    assert json.loads(printed.out)["failures"] == [{"query": "q", "document": "d1", "cause": "ValueError: odd"}]
    assert cli.main(["run", *options]) == 0, "nothing is left to do"


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("gut\nschön\n".encode("latin-1"))
    done = mp_rerank("rank", "q", str(tmp_path / "latin1.txt"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "latin1.txt, line 2: not UTF-8" in done.stderr


def test_an_editor_s_byte_order_mark_is_no_part_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n"b"\n')
    assert [document.text for document in read_documents(str(tmp_path / "marked.jsonl"))] == ["a", "b"]


def test_several_devices_are_one_argument() -> None:
    done = mp_rerank("plan", "--devices", "cuda:0,cuda:1", "--json")
    assert [seat["device"] for seat in json.loads(done.stdout)["seats"]] == ["cuda:0", "cuda:1"]


def test_the_plan_says_how_many_workers_and_why() -> None:
    done = mp_rerank("plan", "--devices", "cpu", "--workers", "3", "--threads", "2")
    assert done.returncode == 0
    assert "logical CPUs" in done.stdout
    assert "3 workers: asked for" in done.stdout
    assert done.stdout.splitlines()[-3:] == [f"worker {i}: cpu, 2 threads" for i in range(3)]
    made = json.loads(mp_rerank("plan", "--devices", "cpu", "--workers", "1", "--threads", "1", "--json").stdout)
    assert made["seats"] == [{"device": "cpu", "threads": 1, "cpus": [], "place": None}]


def test_a_few_documents_are_not_given_a_worker_on_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    seats = tuple(Seat("cpu", 1) for _ in range(32))
    monkeypatch.setattr(RerankerPool, "plan", Plan(seats, ()))

    def workers(documents: int, **options: Any) -> tuple[int | None, int | None]:
        pool = RerankerPool(**options)
        fitted = rank._no_larger_than_worthwhile(pool, "query", [Document("some words " * 20)] * documents)
        return fitted.config.workers, fitted.config.threads_per_worker

    assert workers(12) == (1, 1)
    assert 1 < workers(10**4)[0] < 32  # type: ignore[operator]
    assert workers(10**6) == (None, None), "as planned"
    assert workers(12, workers=4) == (4, None), "as asked for"


def test_the_plan_is_that_of_the_start_method() -> None:
    done = mp_rerank("plan", "--start-method", "fork-model")
    assert "that they share with their template" in done.stdout


def test_no_command_is_a_usage_error() -> None:
    done = mp_rerank()
    assert done.returncode == 2
    assert "usage: mp-rerank" in done.stderr


@pytest.mark.real
def test_documents_are_ranked_offline_by_the_built_in_model() -> None:
    done = mp_rerank("rank", "How many people live in Berlin?", str(BERLIN), "--devices", "cpu", "--top-n", "3")
    assert (done.returncode, done.stderr) == (0, "")
    header, first, *rest = done.stdout.splitlines()
    assert header.split() == ["rank", "score", "document"]
    assert first.split()[0] == "1"
    assert "Berlin had a population of 3,520,031" in first, "Hamburg is said in the words of the question"
    assert len(rest) == 2


def test_records_come_back_whole_as_json() -> None:
    records = [{"id": i, "text": line} for i, line in enumerate(BERLIN.read_text().splitlines())]
    lines = "\n".join(json.dumps(record) for record in records)
    arguments = ("rank", "bread", "--format", "jsonl", "--json", "--devices", "cpu", "--workers", "1")
    done = mp_rerank(*arguments, text=lines, command=fakes.COMMAND)
    assert (done.returncode, done.stderr) == (0, "")
    ranked = json.loads(done.stdout)
    assert ranked[0]["relevance_score"] == max(score_of("bread", record["text"]) for record in records)
    assert sorted(r["index"] for r in ranked) == list(range(len(records)))
    assert all(r["record"] == records[r["index"]] for r in ranked)
    scores = [r["relevance_score"] for r in ranked]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.real
def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = mp_rerank("rank", "q", "--model", str(tmp_path), "--devices", "cpu", "--workers", "1", text="a")
    assert (done.returncode, done.stdout) == (1, "")
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"mp-rerank: error: {tmp_path} could not be loaded on cpu: ")
    assert error.endswith(" [mp-rerank explain ModelLoadError]")


@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process group alone")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.real
def test_ctrl_c_and_sigterm_end_it_quietly_and_leave_no_process(name: str, code: int) -> None:
    documents = "\n".join(f"{i} {'many words ' * 200}" for i in range(2000))
    command = subprocess.Popen(
        [*COMMAND, "rank", "words", "--devices", "cpu"],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process = psutil.Process(command.pid)
    assert command.stdin is not None
    command.stdin.write(documents)
    command.stdin.close()
    command.stdin = None
    while not process.children():  # until the first worker is being started; each pass is a system call or two
        assert command.poll() is None
    children = process.children(recursive=True)
    if name == "SIGINT":
        os.killpg(command.pid, signal.SIGINT)
    else:
        command.terminate()
    stdout, stderr = command.communicate(timeout=PATIENCE)
    assert (command.returncode, stdout, stderr) == (code, "", "")
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
