"""`python -m bench COMMAND ...`: one command a module, imported only when it is asked for."""

import importlib
import sys

#: command -> (module with a `main(argv)`, what it does in one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "backends": ("bench.backends", "speed, rank agreement and memory of torch, ONNX Runtime and OpenVINO, by dtype"),
    "bulk": ("bench.bulk", "mp-rerank run on SciFact and Vaswani, killed in the middle and gone on with"),
    "builtin": ("bench.builtin", "make the built-in model again from its sources"),
    "chaos": ("bench.chaos", "agents, dying workers, and a ledger of every request"),
    "fairness": ("bench.fairness", "delays of small requests with and without a large one"),
    "compare": ("bench.compare", "two runs held against each other: what got slower, beyond the spread of both"),
    "langroid": ("bench.langroid_arms", "ten Langroid agents at once: with the pool, with a lock, with neither"),
    "latency": ("bench.latency", "one request alone and in company; the machinery without a model"),
    "load": ("bench.load", "what importing, constructing and the first prediction cost, cached and not"),
    "matrix": ("bench.matrix", "every environment of the tox matrix tested and raced, on one page"),
    "memory": ("bench.memory", "memory a worker by phase, number of workers, start method and backend"),
    "scale": ("bench.scale", "what 64 workers and 100,000 pending requests cost the dispatcher"),
    "reuse": ("bench.reuse", "what agents that ask alike gain by equal pairs being scored once, and kept"),
    "start": ("bench.start", "time and memory of starting workers, spawned and forked"),
    "suite": ("bench.suite", "all that makes figures of speed and memory, one after the other, onto one page"),
    "throughput": ("bench.throughput", "pairs a second beside the locked model and the library's pool, in one run"),
    "weights": ("bench.weights", "a worker's memory with its weights shared and private, and its speed"),
    "quality": ("bench.quality", "nDCG@10 of rerankers beside random, BM25 and the bi-encoder"),
}


def main(argv: list[str]) -> int:
    """Hand the rest of the command line to the module that owns the command."""
    if not argv or argv[0] not in COMMANDS:
        print("usage: python -m bench COMMAND [options]; suite runs what makes figures\n", file=sys.stderr)
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:<10} {summary}", file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    module, _ = COMMANDS[argv[0]]
    return importlib.import_module(module).main(argv[1:]) or 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
