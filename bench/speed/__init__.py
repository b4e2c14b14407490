"""Commands that measure speed: pairs a second and seconds a request, beside other ways to use a cross-encoder.

    throughput.py   many agents, beside a locked model, the library's pool and other packages
    contenders.py   what `throughput` compares: the pool and the others
    backends.py     torch, ONNX Runtime and OpenVINO in each dtype; also how alike they rank, and their memory
    models.py       architectures beside a locked model, in float32 and 16 bits
    kernels.py      the kernels for CPUs with AMX beside torch
    tokens.py       texts as tokens: from words seen before, and by the library alone
    prefix.py       what a decoder gains where pairs begin alike
    latency.py      one request alone and beside others; the pool's own part of the time, without a model
    fairness.py     delays of small requests beside a large one
    scale.py        what 64 workers and 100,000 pending requests cost the dispatcher
    reuse.py        what scoring equal pairs once saves, and a score cache
    cluster.py      what a Dask worker costs beside a process of this machine
    serve.py        the pool over HTTP, beside the pool itself and beside a lock

What is compared takes turns within one run, so that other load on the machine slows all of it alike.
"""
