"""Commands that measure speed: pairs a second and seconds a request, beside other ways to use a cross-encoder.

    throughput.py   many agents, beside a locked model, the library's pool and other packages
    contenders.py   what `throughput` compares: the pool and the others
    backends.py     torch, ONNX Runtime and OpenVINO in each dtype; also how alike they rank, and their memory
    latency.py      one request alone and beside others; the pool's own part of the time, without a model
    fairness.py     delays of small requests beside a large one
    scale.py        what 64 workers and 100,000 pending requests cost the dispatcher
    reuse.py        what scoring equal pairs once saves, and a score cache

What is compared takes turns within one run, so that other load on the machine slows all of it alike.
"""
