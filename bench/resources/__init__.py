"""Commands that measure what workers cost: their memory, and the time to start them.

    memory.py    memory of a worker after each phase of its life, by number of workers and start method
    weights.py   memory and speed of workers with shared and with private weights
    start.py     seconds to start 1 to 16 workers, to replace a killed one, and to close the pool, for each start method
    growth.py    the same of 1 to 64 workers with a model that does nothing
    load.py      seconds to import the libraries, to construct a model, and to score for the first time

USS is the memory that a process shares with no other; PSS adds its part of the shared memory; RSS counts shared memory
in full.
"""
