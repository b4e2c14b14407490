"""`python -m bench COMMAND ...`: each command is a module, imported only when its command is given."""

import importlib
import sys

#: command -> (module with a `main(argv)`, what it does in one line)
COMMANDS: dict[str, tuple[str, str]] = {
    # speed
    "throughput": (
        "bench.speed.throughput",
        "pairs a second beside a locked model, the library's pool and others",
    ),
    "backends": (
        "bench.speed.backends",
        "speed, agreement and memory of torch, ONNX Runtime and OpenVINO, by dtype",
    ),
    "models": (
        "bench.speed.models",
        "ModernBERT, Ettin, XLM-R, DeBERTa and Qwen3 beside a locked model, in float32 and bfloat16",
    ),
    "kernels": ("bench.speed.kernels", "the kernels for CPUs with AMX beside torch's fastest way, on one core"),
    "tokens": ("bench.speed.tokens", "texts as tokens, from words seen before and by the tokenizer's library alone"),
    "prefix": (
        "bench.speed.prefix",
        "what a decoder gains where pairs begin alike, by the lengths of beginning and document",
    ),
    "latency": ("bench.speed.latency", "one request alone and beside others; the pool's own part, without a model"),
    "fairness": (
        "bench.speed.fairness",
        "delays of small requests beside a large one, and beside another caller's many",
    ),
    "scale": ("bench.speed.scale", "what 64 workers and 100,000 pending requests cost the dispatcher"),
    "cluster": (
        "bench.speed.cluster",
        "what a Dask worker costs beside a process: a slice, 1 to 32 seats, and where one caller's process ends",
    ),
    "reuse": (
        "bench.speed.reuse",
        "what agents that ask alike gain from scoring equal pairs once, and a score cache",
    ),
    "serve": ("bench.speed.serve", "the pool over HTTP, beside the pool itself and beside a lock"),
    # memory and starting
    "memory": ("bench.resources.memory", "memory of a worker by phase, number of workers, start method and backend"),
    "weights": ("bench.resources.weights", "a worker's memory with its weights shared and private, and its speed"),
    "start": ("bench.resources.start", "time and memory of starting workers, by start method"),
    "growth": ("bench.resources.growth", "time and memory of 1 to 64 workers, for each start method; without a model"),
    "load": ("bench.resources.load", "what importing, constructing and the first prediction cost, cached and not"),
    # quality
    "quality": ("bench.quality.ndcg", "nDCG@10 of rerankers beside random, BM25 and the bi-encoder"),
    "builtin": ("bench.builtin", "make the built-in model again from its sources"),
    # faults
    "chaos": ("bench.faults.chaos", "agents while workers are killed, and a check of every request's outcome"),
    "serve-soak": (
        "bench.faults.serve_soak",
        "a server while workers die and clients misbehave, checked",
    ),
    "bulk": ("bench.faults.bulk", "mp-rerank run on SciFact and Vaswani, killed in the middle and run again"),
    "race-where": (
        "bench.faults.race_where",
        "the state that two threads with a CrossEncoder change at once",
    ),
    "matrix": ("bench.faults.matrix", "every environment of the tox matrix tested and raced, on one page"),
    "langroid": ("bench.faults.langroid_arms", "ten Langroid agents at once: with the pool, with a lock, with neither"),
    # reports
    "suite": ("bench.reports.suite", "every command that measures speed or memory, one after the other, onto one page"),
    "compare": ("bench.reports.compare", "two runs compared: what got slower, beyond the spread of both"),
}


def main(argv: list[str]) -> int:
    """Hand the rest of the command line to the module that owns the command."""
    if not argv or argv[0] not in COMMANDS:
        print("usage: python -m bench COMMAND [options]; suite runs what measures speed and memory\n", file=sys.stderr)
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:<10} {summary}", file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    module, _ = COMMANDS[argv[0]]
    return importlib.import_module(module).main(argv[1:]) or 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
