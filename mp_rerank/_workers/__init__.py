"""Workers: processes and threads that hold a model. They know pairs and scores, and no request.

In the parent:
    slot.py            one seat's life: its states, and the worker that has it now
    handle.py          what any kind of worker can do; the one place that makes one
    may_start.py       where workers must not be started, or could not live
    process.py         a worker in a process, from its launch to its end
    launching.py       how that process is started: spawned, or forked by the server
    surroundings.py    what holds meanwhile: signals, descriptors, what a worker is told
    stdlib_names.py    the standard library's private names that are relied on, and what goes without each
    stdlib_patches.py  a function of the standard library, replaced on one thread
    green.py           threads that are greenlets (gevent)
    thread.py          a worker on a thread of this process
    forkserver.py      the process that has done the imports and forks workers
    template.py        the process that has loaded a model and forks workers
    dask.py            a Dask cluster: which seats it has, and how each is reached
    dask_handle.py     a worker in a Dask worker's process: a session with one model
    dask_relay.py      a session by way of the scheduler, where that is all a pool can reach
    logs.py            what is logged, and a worker's words on their way to the parent's ``logging``
    memory.py          memory of a process

In the worker:
    child.py           what a worker runs: initialize, describe, score
    heap.py            what the C library keeps of the memory that batches have used
    preload.py         what the fork server imports
    template_child.py  what a template runs: load, prove, fork
    dask_seat.py       what runs in a Dask worker: sessions, one slice at a time
    lazy_import.py     a package's import put off until it is called

Imports nothing of the scheduling above it. Only ``child`` imports the engine, and only once it runs in a worker.
"""
