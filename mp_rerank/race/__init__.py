"""``mp-rerank race``: do threads go wrong in this environment, with ``CrossEncoder`` or with the pool?

    command.py   this process: runs the others, adds up their results, prints them; imports no torch
    cases.py     a subprocess: threads load and score with ``CrossEncoder``, each case in a forked process
    pools.py     a subprocess: threads do the same with ``RerankerPool``; imports no torch
    rounds.py    what these share: the requests, the threads, the result of a round

All that races runs in subprocesses with a time limit: a race may hang, or leave its process unable to load a model.
Only the command line imports this folder.
"""
