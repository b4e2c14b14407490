"""A loader that does what it must not: it starts a pool inside a worker."""

from __future__ import annotations

from fakes import FakeModel

from mp_rerank import ModelSpec, RerankerPool


def load(spec: object, device: str) -> FakeModel:
    RerankerPool(ModelSpec("fake", loader="fakes:load"), devices="cpu", workers=1).start()
    return FakeModel()
