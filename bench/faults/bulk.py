"""`python -m bench bulk --data DIR`: `mp-rerank run` on SciFact and Vaswani, killed in the middle and run again.

The queries, the corpus, the judgements and BM25's 100 best documents of each query are written to files, in the formats
of BEIR and TREC. `mp-rerank run` reranks them with the built-in model. It gets SIGKILL when a third of the output is
written, is run again, and then measures nDCG before and after. In the end every query must be in the output once, with
all its documents.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.inputs.datasets import HELD_OUT, Collection
from bench.quality.ndcg import candidates
from bench.reports.files import add_output, finish
from bench.reports.report import Report

SETS = ("scifact", "vaswani")
LOST = "queries missing, twice or cut"


def main(argv: Sequence[str]) -> int:
    """Run, kill, run again, and write the table; 1 if a query was lost."""
    parser = argparse.ArgumentParser(prog="python -m bench bulk", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with scifact/ and vaswani/")
    parser.add_argument("--dtype", default="float32", help="of the built-in model (default float32)")
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("bulk", "A whole run, killed in the middle", options)
    for name in SETS:
        collection = HELD_OUT[name](options.data)
        with tempfile.TemporaryDirectory() as folder:
            measure(report, collection, Path(folder), options.dtype)
    finish(report, options.out)
    return int(any(row.median for row in report.rows if row.measure == LOST))


def measure(report: Report, collection: Collection, folder: Path, dtype: str) -> None:
    """Run, kill and run again on one set; add its rows."""
    pairs = write(collection, folder)
    output = folder / "out.run"
    command = [sys.executable, "-m", "mp_rerank.cli", "run", f"--output={output}", f"--dtype={dtype}", "--json"]
    command += [f"--{name}={folder / file}" for name, file in FILES.items()]
    third = pairs // 3
    first = subprocess.Popen([*command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < third):
        time.sleep(0.2)
    first.kill()
    first.wait()
    there = output.read_bytes().count(b"\n")
    done = subprocess.run([*command, f"--qrels={folder / 'qrels.tsv'}"], capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    lines = Counter(line.split()[0] for line in output.read_text().splitlines())
    wanted = Counter(line.split()[0] for line in (folder / FILES["run"]).read_text().splitlines())
    of = {"set": collection.name}
    report.add(of, "queries", len(wanted), better="")
    report.add(of, "pairs", pairs, better="")
    report.add(of, "lines written before SIGKILL", there, better="")
    report.add(of, LOST, sum((lines - wanted).values()) + sum((wanted - lines).values()))
    report.add(of, "pairs/s, second run", summary["pairs_per_second"], better="higher")
    before, after = summary["metrics"].values()
    for measure_name in before:
        report.add(of, f"{measure_name}, BM25", before[measure_name], better="")
        report.add(of, f"{measure_name}, reranked", after[measure_name], better="higher")


FILES = {"queries": "queries.jsonl", "corpus": "corpus.jsonl", "run": "bm25.run"}


def write(collection: Collection, folder: Path) -> int:
    """Write the set as files; returns the number of pairs to score."""
    ranked = candidates(collection)
    with (folder / FILES["queries"]).open("w") as queries, (folder / FILES["run"]).open("w") as run:
        for query, found in ranked.items():
            queries.write(json.dumps({"_id": query, "text": collection.queries[query]}) + "\n")
            for rank, (document, score) in enumerate(found, 1):
                run.write(f"{query} Q0 {document} {rank} {score:.6f} bm25\n")
    with (folder / FILES["corpus"]).open("w") as corpus:
        for document, text in collection.documents.items():
            corpus.write(json.dumps({"_id": document, "text": text}) + "\n")
    with (folder / "qrels.tsv").open("w") as qrels:
        qrels.write("query-id\tcorpus-id\tscore\n")
        for query, grades in collection.qrels.items():
            qrels.writelines(f"{query}\t{document}\t{grade}\n" for document, grade in grades.items())
    return sum(map(len, ranked.values()))
