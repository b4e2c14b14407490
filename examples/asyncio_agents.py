"""Agents as asyncio tasks: none holds up the loop, one is cancelled, and the answers come in as they are ready.

python examples/asyncio_agents.py
"""

import asyncio
from itertools import pairwise
from pathlib import Path

from mp_rerank import RerankerPool

PASSAGES = (Path(__file__).parent / "berlin.txt").read_text().splitlines()
QUESTIONS = [
    "How many people live in Berlin?",
    "Who had the Brandenburg Gate built?",
    "How is bread made?",
    "Where was currywurst invented?",
]


async def ask(pool: RerankerPool, question: str) -> tuple[str, str]:
    """One agent's question and its answer."""
    [best] = await pool.arerank(question, PASSAGES, top_n=1)
    return question, f"{best.relevance_score:.3f}  {best.document}"


async def beat(beats: list[float]) -> None:
    """Whatever else the loop has to do."""
    while True:
        beats.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.01)


async def main() -> None:
    """All agents at once."""
    beats: list[float] = []
    pool = RerankerPool()
    heart = asyncio.create_task(beat(beats))
    try:
        await asyncio.to_thread(pool.start)
        many = [f"{passage} {number}" for number in range(500) for passage in PASSAGES]
        impatient = asyncio.create_task(pool.arerank("Everything about everything", many))
        await asyncio.sleep(0)  # it submits ...
        agents = [asyncio.create_task(ask(pool, question)) for question in QUESTIONS]
        for finished in asyncio.as_completed(agents):
            question, answer = await finished
            print(f"{question}\n  {answer}")
        impatient.cancel()  # ... and thinks better of it: what is not scored yet never will be
        await asyncio.gather(impatient, return_exceptions=True)
        stats = pool.stats()
        print(f"{stats.completed} requests answered, {stats.cancelled} cancelled")
        longest = max(b - a for a, b in pairwise(beats))
        print(f"the loop went round {len(beats)} times meanwhile, and its longest wait was {longest * 1000:.0f} ms")
    finally:
        heart.cancel()
        await asyncio.to_thread(pool.close, drain=False)


asyncio.run(main())
