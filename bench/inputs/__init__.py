"""What is measured on: texts and models.

    datasets.py   readers of test collections and training sets
    models.py     models with random weights, and requests of random words
    fakes.py      models that compute nothing, the tests' own: they wait, or die when a document orders it

Test collections are not part of the repository: commands that need them have the option `--data`.
"""
