"""Commands that count what goes wrong: with dying workers, with an interrupted run, with threads that share a model.

chaos.py            agents submit requests while workers are killed; every outcome is checked
bulk.py             `mp-rerank run` on whole test collections, killed in the middle and run again
matrix.py           tests and `mp-rerank race` in every environment of the tox matrix, on one page
langroid_arms.py    ten Langroid agents at once: with the pool, with a lock, with neither
langroid_tasks.py   a process of `langroid_arms`
"""
