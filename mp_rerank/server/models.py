"""The models that are served: a pool each, by the name that clients know it under."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mp_rerank._planning.checkpoint import folder_of
from mp_rerank.config import ModelSpec
from mp_rerank.errors import RerankError
from mp_rerank.model_pools import ModelPools
from mp_rerank.pool import RerankerPool
from mp_rerank.results import WorkerInfo
from mp_rerank.server.refusals import Refused

__all__ = ["Models", "ServedModel", "served_name"]

logger = logging.getLogger("mp_rerank.server")

SIGMOID, IDENTITY = "sigmoid", "identity"
KNOWN_ACTIVATIONS = {
    "torch.nn.modules.activation.Sigmoid": SIGMOID,
    "torch.nn.modules.linear.Identity": IDENTITY,
}


def served_name(spec: ModelSpec) -> str:
    """What a model is called: a local folder by its last part, for its path is nobody's affair."""
    return os.path.basename(os.path.normpath(spec.name)) if os.path.isabs(spec.name) else spec.name


class ServedModel:
    """One model.

    Workers give logits (``activation="identity"``): some clients want them, others a sigmoid of them, and clients of
    this package what ``CrossEncoder.predict`` gives, which is one of the two.

    Attributes:
        name: what clients call it.
        pool: where it is scored.
        created: seconds since the epoch.
        own_activation: the model's own, ``"sigmoid"`` or ``"identity"``, once it has been loaded.
        max_length, num_labels, dtype, on_cpu: the workers' word, once it has been loaded.
        ready: whether it has been loaded and proved.
    """

    def __init__(self, name: str, spec: ModelSpec, pool: RerankerPool) -> None:
        self.name = name
        self.pool = pool
        self.created = int(time.time())
        self.own_activation = SIGMOID
        self.max_length: int | None = None
        self.num_labels = 1
        self.dtype = ""
        self.on_cpu = True
        self.ready = False
        self._spec = spec

    def load(self) -> None:
        """Load and prove it, and wait for that; errors as of ``RerankerPool.start``."""
        self.pool.start()
        self._learn()

    def reload(self) -> None:
        """Load and prove it anew, as its files are now, and wait for that; errors as of ``RerankerPool.reload``."""
        self.pool.reload(self.pool.spec)
        self._learn()

    def _learn(self) -> None:
        info: WorkerInfo | None = next((worker for worker in self.pool.workers() if worker.state == "ready"), None)
        if info is not None:
            self.max_length, self.num_labels, self.dtype = info.max_length, info.num_labels, info.dtype
            self.on_cpu = info.device.startswith("cpu")
        self.own_activation = _own_activation(self._spec, self.num_labels)
        self.ready = True

    @property
    def failed(self) -> bool:
        """Whether all its workers have been given up."""
        workers = self.pool.workers()
        return bool(workers) and all(worker.state == "failed" for worker in workers)


class Models:
    """All of them. The first is the one that is meant where a request names none.

    Args:
        specs: by the names they are served under.
        aliases: other names for these.
        memory: the bound on all workers' memory, as for ``ModelPools``.
        options: keywords of ``RerankerPool``.

    Raises:
        TypeError, ValueError: naming what is wrong.
    """

    def __init__(
        self, specs: Mapping[str, ModelSpec], *, memory: int | str, aliases: Mapping[str, str], options: dict[str, Any]
    ) -> None:
        self._pools = ModelPools(memory, **options)
        self._served = {
            name: ServedModel(name, spec, self._pools.pool(_with_logits(spec))) for name, spec in specs.items()
        }
        for alias, name in aliases.items():
            if name not in self._served:
                raise ValueError(f"--alias: {name!r} is none of the models that are served: {', '.join(specs)}")
            if alias in self._served:
                raise ValueError(f"--alias: {alias!r} is a model's own name")
        self._aliases = dict(aliases)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._served.values())

    def __len__(self) -> int:
        return len(self._served)

    @property
    def ready(self) -> bool:
        """Whether each has been loaded and proved, and none has lost all its workers."""
        return all(model.ready and not model.failed for model in self._served.values())

    @property
    def first(self) -> ServedModel:
        """The one that is meant where none is named."""
        return next(iter(self._served.values()))

    def names(self) -> dict[str, ServedModel]:
        """Each model by each of its names."""
        return {**self._served, **{alias: self._served[name] for alias, name in self._aliases.items()}}

    def find(self, name: str | None) -> ServedModel:
        """The model of that name, or the first; refuses what is not served. Nothing is looked up anywhere else."""
        if not name:
            return self.first
        found = self._served.get(self._aliases.get(name, name))
        if found is None:
            raise Refused("not_found", f"model {name!r} is not served here; these are: {', '.join(self.names())}")
        return found

    def load(self) -> None:
        """Load and prove all, one after the other, and wait for that; the error of the first that cannot be."""
        for model in self._served.values():
            model.load()
            logger.info("%s is ready: %d workers", model.name, len(model.pool.workers()))

    def reload(self) -> None:
        """Load and prove all anew, one after the other, without a pause. What cannot be stays as it is."""
        for model in self._served.values():
            try:
                model.reload()
            except (RerankError, ValueError) as error:
                logger.error("%s stays as it was: %s [mp-rerank explain model-not-loaded-anew]", model.name, error)
            else:
                logger.warning("%s is loaded anew", model.name)

    def close(self, *, drain: bool) -> None:
        """End all workers, and wait until they are gone."""
        self._pools.close(drain=drain)


def _with_logits(spec: ModelSpec) -> ModelSpec:
    # A loader's scores are what it makes them.
    if spec.loader is not None or spec.activation is not None:
        return spec
    values = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return ModelSpec(**{**values, "activation": "identity"})


def _own_activation(spec: ModelSpec, num_labels: int) -> str:
    """Which activation ``CrossEncoder`` would apply by itself, by the model's configuration, as it reads that."""
    if spec.loader is not None or spec.activation is not None:
        return IDENTITY  # of what the workers give, which is not to be changed any more
    folder = folder_of(spec)
    named = None if folder is None else _named_activation(folder)
    if named is None:
        return SIGMOID if num_labels == 1 else IDENTITY
    if named not in KNOWN_ACTIVATIONS:
        logger.warning(
            "%s: its activation %s is not known here, and is not applied [mp-rerank explain activation-unknown]",
            *(spec.name, named),
        )
    return KNOWN_ACTIVATIONS.get(named, IDENTITY)


def _named_activation(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text())
        named = (config.get("sentence_transformers") or {}).get("activation_fn")
        named = named or config.get("sbert_ce_default_activation_function")
    except (OSError, ValueError, AttributeError):  # modules in folders of their own: the default holds
        return None
    return named if isinstance(named, str) else None
