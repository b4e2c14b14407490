"""Bulk: rerank a run from files to a file, be ended in the middle, and go on from there.

python examples/bulk_run.py
"""

import json
import tempfile
from pathlib import Path

from mp_rerank import RerankerPool
from mp_rerank.bulk import rerank_run

PASSAGES = (Path(__file__).parent / "berlin.txt").read_text().splitlines()
QUESTIONS = {
    "people": "How many people live in Berlin?",
    "gate": "Who had the Brandenburg Gate built?",
    "bread": "How is bread made?",
    "sausage": "Where was currywurst invented?",
}

with tempfile.TemporaryDirectory() as name, RerankerPool() as pool:
    folder = Path(name)
    queries, corpus, run, output = (folder / file for file in ("queries.tsv", "corpus.jsonl", "first.run", "out.run"))
    queries.write_text("".join(f"{query}\t{text}\n" for query, text in QUESTIONS.items()))
    corpus.write_text("".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(PASSAGES)))
    # A first stage that knows nothing: every passage, in the file's order.
    run.write_text(
        "".join(f"{query} Q0 d{i} {i + 1} {-i} first\n" for query in QUESTIONS for i in range(len(PASSAGES)))
    )

    print(rerank_run(pool, queries=queries, corpus=corpus, run=run, output=output))
    whole = output.read_text()

    output.write_text(whole[: len(whole) * 2 // 3])  # as a kill leaves it: some queries, and half of the next one
    print(rerank_run(pool, queries=queries, corpus=corpus, run=run, output=output))
    rows = [line.split() for line in whole.splitlines()]
    again = [line.split() for line in output.read_text().splitlines()]
    print("the same ranking in the end:", [row[:4] for row in again] == [row[:4] for row in rows])

for query, _, document, rank, score, _ in rows:
    if rank == "1":
        print(f"{QUESTIONS[query]}\n  {float(score):.3f}  {PASSAGES[int(document[1:])]}")
