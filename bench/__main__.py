"""`python -m bench COMMAND ...`: one command a module, imported only when it is asked for."""

import importlib
import sys

#: command -> (module with a `main(argv)`, what it does in one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "builtin": ("bench.builtin", "make the built-in model again from its sources"),
    "chaos": ("bench.chaos", "agents, dying workers, and a ledger of every request"),
    "fairness": ("bench.fairness", "delays of small requests with and without a large one"),
    "matrix": ("bench.matrix", "every environment of the tox matrix tested and raced, on one page"),
    "start": ("bench.start", "time and memory of starting workers, spawned and forked"),
    "throughput": ("bench.throughput", "pairs a second beside the locked model and the library's pool, in one run"),
    "weights": ("bench.weights", "a worker's memory with its weights shared and private, and its speed"),
    "quality": ("bench.quality", "nDCG@10 of rerankers beside random, BM25 and the bi-encoder"),
}


def main(argv: list[str]) -> int:
    """Hand the rest of the command line to the module that owns the command."""
    if not argv or argv[0] not in COMMANDS:
        print("usage: python -m bench COMMAND [options]\n", file=sys.stderr)
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:<10} {summary}", file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    module, _ = COMMANDS[argv[0]]
    return importlib.import_module(module).main(argv[1:]) or 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
