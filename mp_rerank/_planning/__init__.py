"""From a machine and a model to seats: how many workers, on which devices, with how many threads.

    machine.py        cores, NUMA nodes, memory and GPUs that this process may use
    checkpoint.py     a model's files: their size, and whether workers can share them
    tuning_cache.py   what ``mp-rerank tune`` measured, kept from run to run
    plan.py           the seats, and the reasons in words

Reads files and environment variables. Imports no torch, and starts no worker.
"""
