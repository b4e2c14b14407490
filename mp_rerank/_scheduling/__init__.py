"""Deciding what is scored next, and by whom. One thread owns all of it.

    admission.py    the bound on pending work, which a caller's thread passes first
    callers.py      counts for each caller
    futures.py      how a caller waits for a result
    streams.py      what a caller iterates over while its request is scored
    request.py      one request: its pairs, its scores so far, its result
    queue.py        which pairs go next: fair between callers, then between a caller's requests
    outcomes.py     what becomes of requests: scored, failed, expired, cancelled
    deployment.py   one model: its queue, its slots, and what is done when a worker dies
    portions.py     how much a worker is given at a time
    scaling.py      how many workers: as many as there is work for
    agreement.py    what the workers of one model must agree on: the canary's scores, the recipe
    departures.py   workers that were let go, until they have ended
    dispatcher.py   the thread: inbox, loop, reload, close

Knows no torch and no process: workers are reached through ``_workers.slot``.
"""
