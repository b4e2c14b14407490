"""Bad input is a clear error where the caller is, before any worker is started for it."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import psutil
import pytest
from conftest import FAKE

import mp_rerank
from mp_rerank import ModelLoadError, ModelSpec, PoolConfig, RerankerPool, errors
from mp_rerank._text import one_line, printable

MakePool = Callable[..., RerankerPool]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"devices": "gpu"}, ValueError, "devices: unknown device 'gpu'"),
        ({"devices": "cuda:x"}, ValueError, "devices: unknown device 'cuda:x'"),
        ({"devices": []}, ValueError, "devices: at least one"),
        ({"workers": 0}, ValueError, "workers: at least 1 is needed, not 0"),
        ({"workers": "two"}, TypeError, "workers: a whole number is needed, not 'two'"),
        ({"workers": True}, TypeError, "workers: a whole number"),
        ({"threads_per_worker": -1}, ValueError, "threads_per_worker: at least 1"),
        (
            {"start_method": "fork-model", "isolation": "thread"},
            ValueError,
            "start_method: 'fork-model' is of no use with isolation='thread'",
        ),
        (
            {"start_method": "fork-model", "devices": ["cpu", "cuda:1"]},
            ValueError,
            "start_method: 'fork-model' works on the CPU only (devices='cpu'), not on cuda:1",
        ),
        (
            {"start_method": "fork"},
            ValueError,
            "start_method: 'spawn', 'forkserver' or 'fork-model' is needed, not 'fork'",
        ),
        ({"min_workers": 3, "workers": 2}, ValueError, "min_workers: at most workers (2) are needed, not 3"),
        ({"min_workers": -1}, ValueError, "min_workers: at least 0"),
        ({"idle_timeout": "long"}, TypeError, "idle_timeout: seconds are needed"),
        ({"isolation": "fork"}, ValueError, "isolation: 'process' or 'thread' is needed, not 'fork'"),
        ({"isolation": "thread", "workers": 2}, ValueError, "workers: isolation='thread' is one model"),
        ({"overload": "drop"}, ValueError, "overload: 'block', 'raise' or seconds"),
        ({"overload": -1.0}, ValueError, "overload: at least 0 seconds"),
        ({"max_pending_pairs_per_caller": 0}, ValueError, "max_pending_pairs_per_caller: at least 1"),
        ({"hang_timeout": "long"}, TypeError, "hang_timeout: seconds are needed"),
        ({"max_restarts": -1}, ValueError, "max_restarts: at least 0 is needed, not -1"),
        ({"max_restarts": True}, TypeError, "max_restarts: a whole number is needed, not True"),
        ({"devices": 7}, TypeError, "devices: a device or a list of devices is needed, not 7"),
        ({"devices": b"cpu"}, TypeError, "devices: a device or a list of devices is needed"),
        ({"devices": ["cpu", None]}, ValueError, "devices: unknown device None"),
        ({"tuned": "false"}, TypeError, "tuned: True or False is needed, not 'false'"),
        ({"restart_backoff": float("nan")}, ValueError, "restart_backoff: at least 0 seconds"),
        ({"max_memory_per_worker": 0}, ValueError, "max_memory_per_worker: at least 1"),
        ({"pin": "node"}, TypeError, "pin: True or False is needed"),
        ({"coalesce": 1}, TypeError, "coalesce: True or False is needed, not 1"),
        ({"score_cache": -1}, ValueError, "score_cache: at least 0 is needed, not -1"),
        ({"score_cache": True}, TypeError, "score_cache: a whole number is needed, not True"),
        ({"score_cache": None}, TypeError, "score_cache: a whole number is needed, not None"),
        ({"wokers": 2}, TypeError, "RerankerPool has no option wokers; it has devices, workers"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        RerankerPool(FAKE, **options)
    assert str(caught.value).startswith(words)


def test_a_folder_that_is_not_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.bin").touch()
    for name, words in [
        (str(tmp_path), "without a config.json: not a model"),
        (str(tmp_path / "file.bin"), "is a file; a model is a folder"),
        (str(tmp_path / "nothing"), "there is no folder"),
        ("./nothing", "there is no folder './nothing'"),
    ]:
        with pytest.raises(ValueError, match=words):
            RerankerPool(name)


def test_every_option_that_switches_something_wants_a_bool() -> None:
    """A word such as "false" is truthy."""
    for options, make in ((ModelSpec, lambda given: ModelSpec("model", **given)), (PoolConfig, PoolConfig.of)):
        flags = [item.name for item in dataclasses.fields(options) if isinstance(item.default, bool)]
        assert flags
        for flag in flags:
            with pytest.raises(TypeError, match=f"{flag}: True or False is needed, not 'false'"):
                make({flag: "false"})


def test_no_device_named_is_every_device() -> None:
    assert PoolConfig(devices=None) == PoolConfig()  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [math.inf, 1e300, 10**400])
def test_a_time_beyond_any_clock_is_no_limit(make_pool: MakePool, seconds: float) -> None:
    names = ("start_timeout", "hang_timeout", "overload", "restart_backoff")
    config = PoolConfig.of(dict.fromkeys(names, seconds))
    assert (config.start_timeout, config.hang_timeout, config.overload) == (None, None, "block")
    with make_pool(isolation="thread", **dict.fromkeys(names, seconds)) as pool:
        assert pool.rerank("q", ["d"], timeout=seconds)
        assert pool.submit_pairs([("q", "d")], timeout=seconds, on_timeout="partial").result().shape == (1,)


def test_what_crossencoder_took_in_any_version_is_taken_where_it_changes_nothing(make_pool: MakePool) -> None:
    with make_pool(isolation="thread") as pool:
        plain = pool.predict([("q", "d")])
        assert pool.predict([("q", "d")], num_workers=2, activation_fct=None, chunk_size=5, prompt=None) == plain
        rest = {"num_workers": 2, "apply_softmax": True, "convert_to_numpy": False, "convert_to_tensor": True}
        assert pool.rank("q", ["d"], **rest) == pool.rank("q", ["d"])


class TestWorkingDirectory:
    """A local model is the folder that its name meant when the spec was made."""

    @pytest.fixture
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "models/tiny").mkdir(parents=True)
        (tmp_path / "models/tiny/config.json").write_text("{}")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        return tmp_path

    @pytest.mark.parametrize(
        "name",
        [
            "models/tiny",
            "./models/tiny",
            "models/tiny/",
            "models/../models//tiny",
            "~/models/tiny",
            Path("models/tiny"),
        ],
    )
    def test_a_folder_s_name_is_made_absolute(self, home: Path, name: str | Path) -> None:
        spec = ModelSpec(name)  # type: ignore[arg-type]
        assert spec == ModelSpec(str(home / "models/tiny"))
        assert spec.name == spec.path == str(home / "models/tiny")
        os.chdir(home / "elsewhere")
        assert dataclasses.replace(spec, max_length=8).path == spec.path
        assert spec.local
        spec.check_exists()

    def test_a_link_is_kept_and_dots_after_one_mean_what_the_system_says(self, home: Path) -> None:
        (home / "elsewhere/deep").mkdir()
        (home / "link").symlink_to("elsewhere/deep")
        (home / "current").symlink_to("models/tiny")
        assert ModelSpec("current").name == str(home / "current")
        (home / "elsewhere/tiny").mkdir()
        assert ModelSpec("link/../tiny").name == str(home / "elsewhere/tiny")

    def test_a_name_that_is_no_folder_stays_a_hub_s(self, home: Path) -> None:
        os.chdir(home / "elsewhere")
        spec = ModelSpec("models/tiny")
        assert spec.name == "models/tiny"
        os.chdir(home)
        assert not spec.local, "it was not, when it was named"
        for odd in ("x" * 5000, "nul\0", "builtin"):
            assert ModelSpec(odd).name == odd

    def test_a_worker_that_is_replaced_loads_it_from_anywhere(self, home: Path, make_pool: MakePool) -> None:
        spec = ModelSpec("models/tiny", loader="fakes:load_from_folder")
        with make_pool(spec, workers=1, max_slices_per_worker=1) as pool:
            pool.rerank("q", ["d"])
            os.chdir("/")
            for _ in range(3):
                assert pool.rerank("q", ["d"])
            pool.reload(spec)
            assert pool.rerank("q", ["d"])

    def test_a_working_directory_that_is_gone_is_named(self, home: Path) -> None:
        os.chdir(home / "elsewhere")
        (home / "elsewhere").rmdir()
        with pytest.raises(ValueError, match=r"model: '\.' is relative to a working directory that does not exist any"):
            ModelSpec(".")
        assert ModelSpec(str(home / "models/tiny")).local
        assert ModelSpec("org/model").name == "org/model"


def test_what_a_model_says_cannot_command_a_terminal_or_forge_a_line_of_a_log(make_pool: MakePool) -> None:
    with make_pool(isolation="thread") as pool, pytest.raises(errors.ScoringError) as caught:
        pool.rerank("q", ["!raise one\x1b[2Jtwo\nthree \ud83d \u202e\u00fc"])
    for text in (str(caught.value), caught.value.cause):
        assert text.endswith("ValueError: one\\x1b[2Jtwo\\nthree \\ud83d \\u202e\u00fc")
    assert "\n" in caught.value.details
    assert "\x1b" not in caught.value.details


def test_text_made_safe_is_one_line_or_several() -> None:
    assert one_line("a\tb\r\n\x9b\u2028 é 柏 👩‍🔬 \\n") == "a\\tb\\r\\n\\x9b\\u2028 é 柏 👩‍🔬 \\n"
    assert printable("a\tb\r\nc\x07") == "a\tb\\r\nc\\x07"


def test_an_empty_or_odd_model_is_named() -> None:
    for model in ("", 7, None):
        with pytest.raises(TypeError, match="model: a name, a path or a ModelSpec"):
            RerankerPool(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"dtype": "float8"}, ValueError, "dtype: one of auto, float32"),
        (
            {"dtype": "int8"},
            ValueError,
            "dtype: one of auto, float32, float16, bfloat16 or None is needed with backend='t",
        ),
        ({"backend": "tensorrt"}, ValueError, "backend: one of torch, onnx, openvino is needed, not 'tensorrt'"),
        ({"backend": "onnx", "dtype": "bfloat16"}, ValueError, "dtype: one of float32, int8 or None is needed with b"),
        ({"backend": "openvino", "dtype": "auto"}, ValueError, "dtype: one of float32, bfloat16, int8 or None"),
        ({"backend": "onnx", "loader": "fakes:load"}, ValueError, "backend: with a loader"),
        ({"max_length": 0}, ValueError, "max_length: at least 1"),
        ({"activation": "relu"}, ValueError, "activation: 'sigmoid', 'identity' or a dotted path"),
        ({"activation": len}, TypeError, "activation: 'sigmoid', 'identity' or a dotted path"),
        ({"model_kwargs": {"hook": lambda: None}}, ValueError, "model_kwargs: it cannot be sent to a worker"),
        ({"config_kwargs": [1]}, TypeError, "config_kwargs: a mapping is needed"),
        ({"trust_remote_code": "false"}, TypeError, "trust_remote_code: True or False is needed, not 'false'"),
        ({"trust_remote_code": 1}, TypeError, "trust_remote_code: True or False is needed, not 1"),
        ({"trust_remote_code": None}, TypeError, "trust_remote_code: True or False is needed, not None"),
        (
            {"model_kwargs": {"trust_remote_code": "false"}},
            TypeError,
            "model_kwargs['trust_remote_code']: True or False is needed, not 'false'",
        ),
        ({"revision": 7}, TypeError, "revision: a string is needed, not 7"),
        ({"revision": ""}, ValueError, "revision: it is empty"),
        ({"backend": ["torch"]}, ValueError, "backend: one of torch, onnx, openvino is needed, not ['torch']"),
        ({"activation": "torch.nn."}, ValueError, "activation: 'sigmoid', 'identity' or a dotted path"),
        ({"activation": "os.system('x')"}, ValueError, "activation: 'sigmoid', 'identity' or a dotted path"),
        ({"max_length": "64"}, TypeError, "max_length: a whole number is needed, not '64'"),
        ({"weights": "both"}, ValueError, "weights: 'shared' or 'private' is needed"),
        ({"prepack": 1}, TypeError, "prepack: True or False is needed"),
        ({"unpad": None}, TypeError, "unpad: True or False is needed"),
        ({"loader": "fakes.load"}, ValueError, "loader: 'package.module:name' is needed"),
        ({"loader": "fakes:nothing"}, ValueError, "loader: fakes:nothing cannot be imported"),
        ({"loader": "nothing_at_all:load"}, ValueError, "loader: nothing_at_all:load cannot be imported"),
        ({"loader": lambda spec, device: None}, ValueError, "loader: test_config:<lambda> cannot be imported"),
        ({"loader": 7}, TypeError, "loader: a function or"),
    ],
)
def test_a_bad_field_of_a_spec_is_named(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        ModelSpec("model", **fields)
    assert str(caught.value).startswith(words)


def test_a_device_that_the_backend_does_not_know_is_named() -> None:
    words = "devices: backend='onnx' computes on the CPU only, not on 'cuda:1'"
    with pytest.raises(ValueError, match=words):
        RerankerPool(ModelSpec(backend="onnx"), devices=["cpu", "cuda:1"])


def test_a_loader_from_the_main_module_is_refused_with_the_way_out() -> None:
    def load(spec: object, device: str) -> None: ...

    load.__module__ = "__main__"
    with pytest.raises(ValueError, match="move it into a module they can import"):
        ModelSpec("model", loader=load)


def test_a_loader_s_module_is_found_and_not_imported() -> None:
    """It may import torch, which the parent never does."""
    assert "dies_at_import" not in sys.modules
    assert ModelSpec("fake", loader="dies_at_import:load").loader == "dies_at_import:load"
    assert "dies_at_import" not in sys.modules


def test_a_loader_may_be_the_function_itself() -> None:
    assert ModelSpec("model", loader=fakes.load) == ModelSpec("model", loader="fakes:load")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: p.submit(7, ["d"]), TypeError, "query: a string is needed, not int 7"),
        (lambda p: p.submit(None, ["d"]), TypeError, "query: a string is needed, not NoneType None"),
        (lambda p: p.submit("q", "one string"), TypeError, "documents: a sequence of strings is needed, not str"),
        (lambda p: p.submit("q", 7), TypeError, "documents: a sequence of strings is needed, not int 7"),
        (lambda p: p.submit("q", ["d", 7]), TypeError, "documents[1]: a string is needed, not int 7"),
        (lambda p: p.submit("q", ["d"], top_n=-1), ValueError, "top_n: at least 0 is needed, not -1"),
        (lambda p: p.submit("q", ["d"], top_n=1.5), TypeError, "top_n: a whole number or None"),
        (lambda p: p.submit("q", ["d"], timeout=0), ValueError, "timeout: more than 0 seconds"),
        (lambda p: p.submit("q", ["d"], timeout="1"), TypeError, "timeout: seconds or None"),
        (lambda p: p.submit("q", ["d"], priority=9), ValueError, "priority: from -8 to 8"),
        (lambda p: p.submit("q", ["d"], priority=0.5), TypeError, "priority: a whole number"),
        (lambda p: p.submit("q", ["d"], on_timeout="wait"), ValueError, "on_timeout: 'raise' or 'partial'"),
        (lambda p: p.submit("q", ["d"], caller=""), ValueError, "caller: a string that is not empty is needed"),
        (lambda p: p.submit("q", ["d"], caller=7), TypeError, "caller: a string is needed, not int 7"),
        (lambda p: p.for_caller(""), ValueError, "caller: a string that is not empty is needed"),
        (lambda p: p.for_caller(None), TypeError, "caller: a string is needed, not NoneType None"),
        (lambda p: p.submit_pairs("text"), TypeError, "pairs: a sequence of (query, document)"),
        (lambda p: p.submit_pairs([("q",)]), TypeError, "pairs[0]: a (query, document) is needed"),
        (lambda p: p.submit_pairs(["qd"]), TypeError, "pairs[0]: a (query, document) is needed"),
        (lambda p: p.submit_pairs([("q", 7)]), TypeError, "pairs[0]: a string is needed, not int 7"),
        (lambda p: p.predict("text"), TypeError, "inputs: pairs of (query, document)"),
        (lambda p: p.predict([("q", "d")], activation_fn=abs), ValueError, "activation_fn: it is the pool's own"),
        (lambda p: p.rank("q", ["d"], device="cpu"), ValueError, "device: it is the pool's own"),
        (lambda p: p.predict([("q", "d")], activation_fct=abs), ValueError, "activation_fct: it is the pool's own"),
        (lambda p: p.rank("q", ["d"], pool={}), ValueError, "pool: it is the pool's own"),
        (lambda p: p.predict([("q", "d")], top_k=1), TypeError, "top_k: no version of CrossEncoder has such an arg"),
    ],
)
def test_a_bad_argument_is_named_before_the_pool_is_started(
    make_pool: MakePool, call: Callable[[RerankerPool], object], error: type[Exception], words: str
) -> None:
    pool = make_pool()
    with pytest.raises(error) as caught:
        call(pool)
    assert str(caught.value).startswith(words)
    assert pool.workers() == []


def test_a_loader_that_fails_is_reported_with_its_words(make_pool: MakePool) -> None:
    pool = make_pool(ModelSpec("!raise no such weights", loader="fakes:load_obeying"))
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="on cpu: ValueError: no such weights") as caught:
            pool.start()
    assert caught.value.device == "cpu"
    assert caught.value.model == "fakes:load_obeying"
    assert caught.value.cause == "ValueError: no such weights"
    assert "raise ValueError(rest)" in caught.value.details


def test_workers_that_hold_different_models_are_found_out(make_pool: MakePool) -> None:
    with pytest.raises(ModelLoadError, match=r"do not hold the same model.* no trained head"):
        make_pool(ModelSpec("random", loader="fakes:load_random")).start()


def test_where_the_models_files_have_changed_meanwhile_the_error_says_to_reload(
    make_pool: MakePool, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_text("old ")
    spec = ModelSpec(str(checkpoint), loader="fakes:load_file")
    with make_pool(spec, workers=1, max_restarts=1) as pool:
        checkpoint.write_text("new ")
        with pytest.raises(ModelLoadError, match=r"files have changed .* reload\(\) loads the new ones"):
            pool.rerank("query", ["!os._exit 3"])


def test_a_model_that_miscounts_is_an_error(make_pool: MakePool) -> None:
    with make_pool(ModelSpec("miscounting", loader="fakes:load_miscounting"), workers=1) as pool:
        assert len(pool.rerank("query", ["long enough to count", "and another one"])) == 2
        with pytest.raises(errors.ScoringError, match=r"document 0 .*scores of shape \(7,\) for 1 pairs"):
            pool.rerank("query", ["short", "s", "s"])


def test_every_error_survives_pickling_with_its_facts() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        error = kind("words")
        for fact in vars(error):
            setattr(error, fact, f"some {fact}")
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == "words"
        assert vars(copy) == vars(error)


def test_every_public_name_is_there() -> None:
    for name in mp_rerank.__all__:
        assert getattr(mp_rerank, name).__name__ == name
        assert name in dir(mp_rerank)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mp_rerank.nothing  # noqa: B018


def test_a_configuration_is_a_value() -> None:
    assert PoolConfig(devices=["cpu"]) == PoolConfig(devices="cpu")
    assert pickle.loads(pickle.dumps(FAKE)) == FAKE


def test_making_a_pool_starts_nothing() -> None:
    threads, children = threading.active_count(), psutil.Process().children()
    RerankerPool(FAKE)
    assert threading.active_count() == threads
    assert psutil.Process().children() == children


def test_a_slip_of_a_number_is_no_number_of_workers() -> None:
    with pytest.raises(ValueError, match="workers: at most 10000"):
        PoolConfig(workers=10**30)


@pytest.mark.parametrize("name", ["convert_to_tensor", "convert_to_numpy", "apply_softmax"])
def test_a_word_is_no_flag_of_predict(make_pool: MakePool, name: str) -> None:
    pool = make_pool()
    with pytest.raises(TypeError, match=f"{name}: True or False is needed"):
        pool.predict([("query", "document")], **{name: "false"})
    with pytest.raises(TypeError, match="return_documents: True or False is needed"):
        pool.rank("query", ["document"], return_documents="false")  # type: ignore[arg-type]
    assert pool.workers() == [], "nothing was started for it"
