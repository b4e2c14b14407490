"""What the workers of one model must agree on: the canary's scores, and the recipe that makes the model fast.

The first worker that is ready sets the canary's scores, and each later one must come to the same: then all hold one
model. One worker finds the recipe for its kind of device, and the others follow it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mp_rerank._pairs import tolerance
from mp_rerank._recipe import Recipe
from mp_rerank._scheduling.queue import Slice
from mp_rerank._workers.child import WorkerFacts
from mp_rerank._workers.slot import Slot
from mp_rerank.errors import ModelLoadError

__all__ = ["Agreement"]


class Agreement:
    """What the first workers of a model have found, and whether the next ones find the same.

    Args:
        model: the model's name, for messages.

    Attributes:
        facts: of the first worker that was ready.
    """

    def __init__(self, model: str) -> None:
        self.facts: WorkerFacts | None = None
        self._model = model
        self._canary_device = ""
        self._recipes: dict[str, Recipe | None] = {}  # by the kind of device; ``None``: nothing can be optimized
        self._provers: dict[str, Slot[Slice]] = {}  # whose workers are finding the recipes now

    def describe_waiting(self, slots: Iterable[Slot[Slice]]) -> None:
        """Let workers that have loaded the model make it fast: by the recipe, or one of them to find it.

        What pays differs between kinds of devices, so each kind has a recipe.
        """
        for slot in slots:
            if slot.waiting:
                kind = _kind_of(slot)
                if kind in self._recipes:
                    slot.describe(self._recipes[kind])
                elif kind not in self._provers:
                    self._provers[kind] = slot
                    slot.describe(None)

    def gone(self, slot: Slot[Slice]) -> bool:
        """Note that the slot's worker has ended; whether it was finding a recipe, so that another is to."""
        if self._provers.get(_kind_of(slot)) is not slot:
            return False
        del self._provers[_kind_of(slot)]
        return True

    def learn_recipe(self, slot: Slot[Slice], facts: WorkerFacts) -> None:
        """Keep the recipe of the slot's worker for the workers after it, if it is the first of its kind."""
        self._recipes.setdefault(_kind_of(slot), facts.recipe)

    def check(self, slot: Slot[Slice], facts: WorkerFacts) -> ModelLoadError | None:
        """The error for a worker whose model is not that of the others; the first one's is right."""
        device = slot.seat.device
        if self.facts is None:
            self.facts, self._canary_device = facts, device
            return None
        apart = "another worker" if device == self._canary_device else "another device"
        limit = tolerance(apart, facts.dtype)
        if facts.num_labels == self.facts.num_labels and np.allclose(
            facts.canary, self.facts.canary, rtol=limit, atol=limit
        ):
            return None
        cause = (
            f"its canary pairs score {facts.canary}, another worker's {self.facts.canary}: they do not hold the "
            "same model. Either the checkpoint has no trained head, and each process draws a random one; or the "
            "model's files have changed since the pool started: reload() loads the new ones in all workers"
        )
        return ModelLoadError(f"{self._model} on {device}: {cause}", model=self._model, device=device, cause=cause)


def _kind_of(slot: Slot[Slice]) -> str:
    """The kind of the slot's device: ``"cpu"``, ``"cuda"``, …"""
    return slot.seat.device.partition(":")[0]
