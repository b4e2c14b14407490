"""Threads load and score with ``CrossEncoder``: ``python -m mp_rerank.race.cases FOLDER THREADS ROUNDS``.

Makes the models in FOLDER and writes the expected scores there. Prints a line of JSON for each round, with what went
wrong in it. Rounds run in child processes, forked if the system can fork: this process has imported the libraries and
not used them. A child in which something went wrong for good, or hung, runs no further round.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

from mp_rerank._engine.loading import module_of, version_of
from mp_rerank.race.rounds import (
    HUNG,
    MODELS,
    PATIENCE,
    REFERENCE,
    TIED,
    Pairs,
    Reference,
    Round,
    key_of,
    kill_tree,
    kind_of,
    only_json,
    requests,
    together,
)

__all__ = [
    "CASES",
    "DTYPES",
    "LIBRARY_POOL_WORKERS",
    "altered",
    "apart",
    "dtypes_of",
    "has_library_pool",
    "load",
    "make_models",
    "named",
    "predict",
]

# Many small layers: the code that races is Python, run for each module. Two threads are in it at once only if it runs
# for longer than a thread keeps the interpreter (5 ms).
LAYERS = 12
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIBRARY_POOL_WORKERS = 2
# The limit of a child. A round takes a few seconds and has limits for its threads; this one is for a child that hangs.
LIMIT_SECONDS = 4 * PATIENCE

Case = Callable[[Path, int, int, Reference], Iterator[Round]]


def make_models(folder: Path) -> None:
    """Save two rerankers with random weights, and a model whose output weights are tied to its embeddings.

    The weights have a wide spread: with the usual narrow one all pairs score alike, and mixed-up scores go unnoticed.
    """
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(200))]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=128,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
        num_labels=1,
    )
    for seed, name in enumerate((*MODELS, TIED)):
        torch.manual_seed(seed)
        model = BertForMaskedLM(config) if name == TIED else BertForSequenceClassification(config)
        if name != TIED:
            torch.nn.init.normal_(model.classifier.weight, std=0.5)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def load(folder: Path, name: str = MODELS[0], dtype: str | None = None) -> Any:
    """A ``CrossEncoder`` on the CPU, with the arguments under their names in the installed versions."""
    accepted = inspect.signature(CrossEncoder.__init__).parameters
    loading = "model_kwargs" if "model_kwargs" in accepted else "automodel_args"
    argument = "dtype" if version_of(transformers) >= (4, 56) else "torch_dtype"
    options: dict[str, Any] = {} if dtype is None else {loading: {argument: DTYPES[dtype]}}
    return CrossEncoder(str(folder / name), device="cpu", **options)


def dtypes_of(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module_of(model).parameters()}


def predict(model: Any, pairs: Pairs, activation: torch.nn.Module | None = None, **options: Any) -> np.ndarray:
    if activation is not None:
        accepted = inspect.signature(CrossEncoder.predict).parameters
        options["activation_fn" if "activation_fct" not in accepted else "activation_fct"] = activation
    # As a tensor: sentence-transformers 3.0 cannot make an array of bfloat16.
    scores = model.predict(pairs, show_progress_bar=False, convert_to_tensor=True, **options)
    found: np.ndarray = scores.float().cpu().numpy()
    return found


def process_state() -> dict[str, Any]:
    """The state of the process that loading changes and should restore."""
    base = transformers.PreTrainedModel
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.nn.Module.register_parameter": torch.nn.Module.register_parameter,
        "torch.nn.Module.register_buffer": torch.nn.Module.register_buffer,
        "torch.nn.init.normal_": torch.nn.init.normal_,
        "torch.linspace": torch.linspace,
        "PreTrainedModel.tie_weights": base.tie_weights,
        "PreTrainedModel.init_weights": base.init_weights,
        "transformers.modeling_utils._init_weights": getattr(transformers.modeling_utils, "_init_weights", None),
    }


ORIGINAL = process_state()


def altered() -> list[str]:
    """The parts of that state that differ from when this process began, and their values now."""
    return [f"{name} is {named(now)}" for name, now in process_state().items() if now is not ORIGINAL[name]]


def named(value: Any) -> str:
    """A function by its module and name, anything else as it prints."""
    if not hasattr(value, "__qualname__"):
        return str(value)
    return ".".join(filter(None, [getattr(value, "__module__", None), value.__qualname__]))


def poison(folder: Path, of: Round) -> list[str]:
    """What goes wrong when this thread loads alone, after the race, in this process."""
    found = []
    try:
        model = load(folder)
        if dtypes_of(model) != {torch.float32}:
            found.append("a load alone comes out in the wrong dtype")
        elif not of.as_expected(predict(model, requests(1)[0]), 0, key_of(MODELS[0])):
            found.append("a load alone scores wrongly")
    except Exception as error:
        found.append(f"a load alone raises {kind_of(error)}")
    try:
        tied = BertForMaskedLM.from_pretrained(folder / TIED)
        if tied.get_output_embeddings().weight is not tied.get_input_embeddings().weight:
            found.append("a model with tied weights, loaded alone, has random ones in their place")
    except Exception as error:
        found.append(f"a model with tied weights, loaded alone, raises {kind_of(error)}")
    if torch.zeros(1).dtype != torch.float32:
        found.append(f"every new tensor is {torch.zeros(1).dtype}")
    return found


# The cases. Each yields a Round at a time, and is stopped after a round that left poison or hung threads.


def control(folder: Path, threads: int, rounds: int, _: Reference) -> Iterator[Round]:
    """Load and score one after another, as the threads will do at once; these are the expected scores."""
    make_models(folder)
    reference: Reference = {}
    asked = requests(threads)
    for turn in range(rounds):
        result = Round(reference)
        for number in range(max(threads, 4)):
            name, dtype = MODELS[number % 2], ("float32", "bfloat16")[number // 2 % 2]
            model = load(folder, name, dtype)
            result.tries += 1
            result.wrong_dtypes += dtypes_of(model) != {DTYPES[dtype]}
            if turn == 0 and number < 4:
                for logits in (False, True):
                    activation = torch.nn.Identity() if logits else torch.nn.Sigmoid()
                    scores = [predict(model, pairs, activation).tolist() for pairs in asked]
                    reference[key_of(name, dtype, logits=logits)] = scores
            else:
                result.check_scores(predict(model, asked[number % threads]), number % threads, key_of(name, dtype))
        (folder / REFERENCE).write_text(json.dumps(reference))
        result.altered, result.poison = altered(), poison(folder, result)
        yield result


def loads(
    choose: Callable[[int], tuple[str, str | None]],
) -> Case:
    """The case in which each thread loads a model; ``choose`` says which model and dtype, by the thread's number."""

    def case(folder: Path, threads: int, rounds: int, reference: Reference) -> Iterator[Round]:
        asked = requests(threads)
        for _ in range(rounds):
            result = Round(reference)
            wanted = [choose(i) for i in range(threads)]
            loaded = result.take(together([partial(load, folder, *want) for want in wanted]))
            result.altered = altered()
            for number, (model, (name, dtype)) in enumerate(zip(loaded, wanted, strict=True)):
                if model is None:
                    continue
                if dtypes_of(model) != {DTYPES[dtype or "float32"]}:
                    result.wrong_dtypes += 1
                else:  # scored here, after the race
                    try:
                        result.check_scores(predict(model, asked[number]), number, key_of(name, dtype))
                    except Exception as error:
                        result.errors[f"in predict: {kind_of(error)}"] += 1
            result.poison = poison(folder, result)
            yield result

    return case


def shared_model(folder: Path, threads: int, rounds: int, reference: Reference) -> Iterator[Round]:
    """All threads score with one model."""
    return _predictions(folder, threads, rounds, reference, own_activations=False)


def own_activations(folder: Path, threads: int, rounds: int, reference: Reference) -> Iterator[Round]:
    """All threads score with one model, each with the activation it names: half sigmoid, half identity."""
    return _predictions(folder, threads, rounds, reference, own_activations=True)


def _predictions(
    folder: Path, threads: int, rounds: int, reference: Reference, own_activations: bool
) -> Iterator[Round]:
    asked = requests(threads)
    for _ in range(rounds):
        model = load(folder)  # a new model in each round: its first call sets something up
        result = Round(reference)

        def work(number: int, model: Any = model) -> list[tuple[str, Any]]:
            logits = own_activations and number % 2
            activation = (torch.nn.Identity() if logits else torch.nn.Sigmoid()) if own_activations else None
            key = key_of(MODELS[0], logits=bool(logits))
            return [(key, predict(model, asked[number], activation, batch_size=8)) for _ in range(4)]

        for number, outcome in enumerate(result.take(together([partial(work, number) for number in range(threads)]))):
            # A thread counts once, however many of its calls are wrong.
            result.wrong_scores += any(not result.as_expected(s, number, key) for key, s in outcome or ())
        result.altered, result.poison = altered(), poison(folder, result)
        yield result


def library_pool(
    chunk_size: int | None,
) -> Case:
    """The case in which all threads score through the library's own pool of processes."""

    def case(folder: Path, threads: int, rounds: int, reference: Reference) -> Iterator[Round]:
        asked = requests(threads)
        model = load(folder)
        processes = model.start_multi_process_pool(["cpu"] * LIBRARY_POOL_WORKERS)
        key = key_of(MODELS[0])
        try:
            alone = predict(model, asked[0], pool=processes, chunk_size=chunk_size)  # its workers have started

            def work(pairs: Pairs) -> list[np.ndarray]:
                return [predict(model, pairs, pool=processes, chunk_size=chunk_size) for _ in range(4)]

            for _ in range(rounds):
                result = Round(reference)
                assert result.as_expected(alone, 0, key)
                outcomes = result.take(together([partial(work, pairs) for pairs in asked]))
                for number, scores in enumerate(outcomes):
                    result.wrong_scores += any(not result.as_expected(s, number, key) for s in scores or ())
                result.altered = altered()
                [later] = together([partial(predict, model, asked[0], pool=processes, chunk_size=chunk_size)])
                if later is HUNG:
                    result.poison = ["a later call alone hangs"]
                elif isinstance(later, Exception):
                    result.poison = [f"a later call alone raises {kind_of(later)}"]
                elif not result.as_expected(later, 0, key):
                    result.poison = ["a later call alone gets another's scores"]
                yield result
        finally:
            model.stop_multi_process_pool(processes)

    return case


def has_library_pool() -> bool:
    """Whether this version's ``CrossEncoder`` has a process pool."""
    accepted = inspect.signature(CrossEncoder.predict).parameters
    return hasattr(CrossEncoder, "start_multi_process_pool") and "pool" in accepted


CASES: dict[str, Case] = {
    "control": control,
    "load": loads(lambda i: (MODELS[0], None)),
    "dtypes": loads(lambda i: (MODELS[0], ("float32", "bfloat16")[i % 2])),
    "models": loads(lambda i: (MODELS[i % 2], None)),
    "predict": shared_model,
    "activations": own_activations,
    "library-pool": library_pool(None),
    "library-pool-one-chunk": library_pool(1000),
}


def run_rounds(send: Connection, case: str, folder: Path, threads: int, rounds: int) -> None:
    """Run rounds of a case until one leaves this process unfit for the next."""
    reference = {} if case == "control" else json.loads((folder / REFERENCE).read_text())
    running = CASES[case](folder, threads, rounds, reference)
    for result in running:
        send.send(result.as_json())
        if result.poison or result.hangs:
            break
    running.close()  # type: ignore[attr-defined]


def run_case(case: str, folder: Path, threads: int, rounds: int) -> Iterator[Any]:
    """Run rounds of a case, in as many processes as needed; yields each round's result, or its process's failure."""
    while rounds > 0:
        for said in apart(run_rounds, case, folder, threads, rounds):
            yield said
            rounds -= 1


def apart(target: Callable[..., None], *arguments: Any, limit: float = LIMIT_SECONDS) -> Iterator[Any]:
    """Call ``target(connection, *arguments)`` in a process of its own, and yield what it sends.

    If the process fails, or is killed after it has sent nothing for ``limit`` seconds, ``{"failure": ...}`` comes last.
    """
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_begin, args=(target, sender, arguments))
    process.start()
    sender.close()
    try:
        while receiver.poll(limit):
            yield receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"failure": f"the process ended with {process.exitcode}"}
    else:
        kill_tree(process.pid)
        process.join()
        yield {"failure": "hung"}


def _begin(target: Callable[..., None], send: Connection, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    try:
        target(send, *arguments)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        send.send({"failure": f"outside of the threads: {kind_of(error)}"})
    send.close()
    os._exit(0)  # do not wait for threads that hang


def main(arguments: Sequence[str]) -> None:
    """Run every case; see the module's docstring."""
    place, threads, rounds = arguments
    with only_json() as out:
        for case in CASES:
            if case.startswith("library-pool") and not has_library_pool():
                print(json.dumps({"case": case, "absent": True}), file=out, flush=True)
                continue
            for said in run_case(case, Path(place), int(threads), int(rounds)):
                print(json.dumps({"case": case, **said}), file=out, flush=True)
            if not (Path(place) / REFERENCE).is_file():
                return  # the control failed: there are no scores to compare with


if __name__ == "__main__":
    main(sys.argv[1:])
