"""Agents in threads, one pool: each reads its way through the passages, best one first, until nothing is left to say.

python examples/agents.py
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mp_rerank import RerankerPool

PASSAGES = (Path(__file__).parent / "berlin.txt").read_text().splitlines()
QUESTIONS = [
    "How many people live in Berlin?",
    "When was the Berlin Wall torn down?",
    "Who had the Brandenburg Gate built?",
    "What is the largest city in the USA?",
    "Which rivers flow through Berlin?",
    "How is bread made?",
    "Where was currywurst invented?",
    "How many residents does Potsdam have?",
]
TURNS = 3
WORTH_READING = 0.2  # of the best passage's score


def agent(pool: RerankerPool, question: str) -> str:
    """One agent: it asks, reads the best passage it has not read, and asks again, knowing more."""
    context, unread, first, notes = question, list(PASSAGES), None, []
    for _ in range(TURNS):
        future = pool.submit(context, unread, top_n=1)  # returns at once; other agents' requests go along with it
        best = future.result()[0]
        if first is not None and best.relevance_score < WORTH_READING * first:
            break
        first = first or best.relevance_score
        notes.append(f"  {best.relevance_score:.3f}  {best.document}")
        context = f"{question} {best.document}"
        unread.pop(best.index)
    return "\n".join([question, *notes])


with RerankerPool() as pool, ThreadPoolExecutor(len(QUESTIONS)) as threads:
    for answer in threads.map(lambda question: agent(pool, question), QUESTIONS):
        print(answer)
    stats = pool.stats()
    print(
        f"{stats.completed} requests, {stats.scored_pairs} pairs, {stats.slices} slices, "
        f"{stats.gathered_slices} of them for several agents, {len(pool.workers())} workers"
    )
