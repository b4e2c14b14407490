"""What is measured on.

datasets.py    readers of test collections and training sets
models.py      models with random weights, and requests of random words
fakemodel.py   models that compute nothing: they wait, or die when a document tells them to
"""
