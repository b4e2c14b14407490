"""Threads load and score with ``RerankerPool``: ``python -m mp_rerank.race.pools FOLDER THREADS ROUNDS``.

Imports no torch. ``cases`` has left the models and the expected scores in FOLDER. Prints a line of JSON for each round.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mp_rerank import ModelSpec, RerankerPool
from mp_rerank.race.rounds import (
    MODELS,
    PATIENCE,
    REFERENCE,
    Reference,
    Round,
    key_of,
    kind_of,
    only_json,
    requests,
    together,
)

WORKERS = 2
# Longer than in ``cases``: each pool starts processes that import torch.
START_SECONDS = 3 * PATIENCE

# Case -> (model, dtype, activation) of each of its pools; thread i uses pool i modulo their number.
CASES: Mapping[str, Sequence[tuple[str, str | None, str | None]]] = {
    "pool": [(MODELS[0], None, None)],
    "pools": [(MODELS[0], "float32", None), (MODELS[1], "bfloat16", None), (MODELS[0], None, "identity")],
}


def race(case: str, folder: Path, threads: int, rounds: int, reference: Reference) -> Iterator[Round]:
    """Run rounds of one case: all threads start new pools at the same moment, and then score with them."""
    asked = requests(threads)
    held = CASES[case][:threads]
    keys = [key_of(name, dtype, logits=activation == "identity") for name, dtype, activation in held]
    for _ in range(rounds):
        result = Round(reference)
        pools = [
            RerankerPool(
                ModelSpec(str(folder / name), dtype=dtype, activation=activation),
                devices="cpu",
                workers=WORKERS if len(held) == 1 else 1,
                threads_per_worker=1,
                coalesce=False,  # each request is scored separately
            )
            for name, dtype, activation in held
        ]

        def work(number: int, pools: list[RerankerPool] = pools) -> list[np.ndarray]:
            pool = pools[number % len(pools)].start()
            return [pool.submit_pairs(asked[number]).result(PATIENCE) for _ in range(4)]

        try:
            for number, scores in enumerate(
                result.take(together([partial(work, number) for number in range(threads)], START_SECONDS))
            ):
                mine = number % len(pools)
                result.wrong_scores += any(not result.as_expected(s, number, keys[mine]) for s in scores or ())
                dtypes = {worker.dtype for worker in pools[mine].workers()}
                result.wrong_dtypes += dtypes != {held[mine][1] or "float32"}
            for pool, key in zip(pools, keys, strict=True):
                try:
                    if not result.as_expected(pool.submit_pairs(asked[0]).result(PATIENCE), 0, key):
                        result.poison.append("a request alone scores wrongly")
                except Exception as error:
                    result.poison.append(f"a request alone raises {kind_of(error)}")
        finally:
            for pool in pools:
                pool.close(drain=False)
        yield result


def main(arguments: Sequence[str]) -> None:
    """Run both cases; see the module's docstring."""
    place, threads, rounds = arguments
    folder = Path(place)
    with only_json() as out:
        reference = json.loads((folder / REFERENCE).read_text())
        for case in CASES:
            for result in race(case, folder, int(threads), int(rounds), reference):
                print(json.dumps({"case": case, **result.as_json()}), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
