"""Imported by the fork server, once: what every worker needs, so that each fork has it already.

One thread only: a fork does not take threads along, and a library that has started some would wait for them. A worker
sets its own number before the first of them is needed. Nothing may touch a GPU: a fork could not use it afterwards.
"""

from __future__ import annotations

import contextlib
import io
import os

from mp_rerank._workers.child import import_engine, set_threads

set_threads(1)
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch.cuda.is_available() then asks the driver's library, not CUDA

with contextlib.redirect_stderr(io.StringIO()):
    import_engine()
