"""How well rerankers order documents.

ndcg.py        the command `quality`: nDCG@10 of rerankers on BM25's 100 best documents
retrieval.py   BM25 and the bi-encoder, which find candidates, are compared with, and teach the built-in model
"""
