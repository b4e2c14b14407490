"""``mp-rerank race``: does loading and scoring in threads go wrong in this environment, and does the pool's?

    command.py   this process: starts the others, adds up what they say, prints it; imports no torch
    cases.py     a subprocess: threads that load and score with ``CrossEncoder``, each case in a process forked off it
    pools.py     a subprocess: the same work through ``RerankerPool``; imports no torch
    rounds.py    what the subprocesses share

Everything that races runs in a subprocess with a time limit, since it may hang, and may leave its process unfit for any
later load. The core imports nothing of this package.
"""
