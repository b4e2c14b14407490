"""Commands that measure speed: pairs a second and seconds a request, beside other ways to use a cross-encoder.

throughput.py   many agents, beside the locked model, the library's pool and other packages
contenders.py   those others, for `throughput`
backends.py     torch, ONNX Runtime and OpenVINO in each dtype; also how alike they rank, and their memory
latency.py      one request alone and beside others; the pool's own part of the time, without a model
fairness.py     delays of small requests beside a large one
scale.py        what 64 workers and 100,000 pending requests cost the dispatcher
reuse.py        what equal pairs save that are scored once, and what a score cache saves
"""
