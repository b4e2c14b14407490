"""Commands that count what goes wrong: with dying workers, with an interrupted run, with threads that share a model.

    chaos.py            agents submit requests while workers are killed; every outcome is checked
    bulk.py             `mp-rerank run` on whole test collections, killed in the middle and run again
    matrix.py           tests and `mp-rerank race` in every environment of the tox matrix, on one page
    race_where.py       the command `race-where`: which state two threads with a CrossEncoder change at once
    race_watch.py       the process of `race-where`: functions of the libraries wrapped, threads inside them noted
    langroid_arms.py    the command `langroid`: ten Langroid agents at once, with the pool, with a lock, with neither
    langroid_tasks.py   the processes of `langroid`: the agents and their tasks

`chaos` and `bulk` fail when a request is lost; `matrix` fails when a test does, or when the pool goes wrong in a race.
"""
