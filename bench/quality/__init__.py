"""How well rerankers order documents.

    ndcg.py        the command `quality`: nDCG@10 of rerankers on BM25's 100 best documents
    retrieval.py   BM25 and a bi-encoder

BM25 finds the candidates. Rerankers are compared with both, and the built-in model was trained to score as both do.
"""
