"""Deciding what is scored next, and by whom. One thread owns all of it.

    admission.py    the bound on pending work, which a caller's thread passes first
    futures.py      how a caller waits for a result
    request.py      one request: its pairs, its scores so far, its result
    queue.py        which pairs go next: weighted fair queueing
    deployment.py   one model: its queue, its slots, deaths and blame
    dispatcher.py   the thread: inbox, loop, reload, close

Knows no torch and no process: workers are reached through ``_workers.slot``.
"""
