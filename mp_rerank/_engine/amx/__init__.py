"""Kernels for CPUs with AMX: products of matrices in tiles, and what stands beside them, in C++.

    tiles.h         what all kernels are made of: tiles, float32 numbers as three bfloat16 ones, 16 numbers at a time
    linear.cpp      linear layers, with bias, activation, sum or product; two, or several of one input, at once
    rows.cpp        norms and rotary positions
    attention.cpp   attention within each pair of a row of tokens: both products and the softmax, in one pass
    support.cpp     whether this process can compute in tiles
    library.py      the kernels as one shared library: loaded, or why it is not
    linear.py       a linear layer with its weight packed into tiles
    rows.py         norms and rotary positions
    attention.py    what attends to what in a row, as the kernel is given it

The library knows pointers and numbers, no torch and no Python: one build serves all versions of both. It is built with
the wheel where there is a C++ compiler (``hatch_build.py``). Without it, or on another CPU, torch computes as before.
"""
