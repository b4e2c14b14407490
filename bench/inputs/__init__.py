"""What is measured on: texts and models.

    datasets.py    readers of test collections and training sets
    models.py      models with random weights, and requests of random words
    fakemodel.py   models that compute nothing: they wait, or die when a document tells them to

Test collections are not part of the repository: commands that need them have the option `--data`.
"""
