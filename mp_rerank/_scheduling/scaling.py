"""How many workers: as many as there is work for, within ``min_workers`` and the number of slots.

Pure: it says which slots are to get a worker, and which are to lose theirs. The deployment does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mp_rerank._scheduling.queue import Slice
from mp_rerank._workers.slot import Slot, SlotState
from mp_rerank.config import PoolConfig

__all__ = ["idle_until", "least_workers", "retirable", "wanted"]


def least_workers(slots: Sequence[Slot[Slice]], config: PoolConfig) -> int:
    """How many workers there are at least, but for those that failed."""
    asked = config.min_workers
    if asked is None:
        asked = len(slots) if config.idle_timeout is None else 1
    return min(asked, len(slots))


def wanted(
    slots: Sequence[Slot[Slice]], config: PoolConfig, waiting_tokens: int, slice_tokens: int
) -> list[Slot[Slice]]:
    """The resting slots to launch workers for: for what waits beside all that the others have been given, and no more.

    Those that are loading, or will soon take their second slice, count as if they had taken it. A worker that is
    launched stays for ``idle_timeout`` at least: so work that comes and goes starts no more of them than that.

    Args:
        waiting_tokens: the estimated tokens of all pairs that wait.
        slice_tokens: those of a full slice.
    """
    resting = [slot for slot in slots if slot.state is SlotState.RESTING]
    on_their_way = sum(slot.state in (SlotState.STARTING, SlotState.RESTARTING) for slot in slots)
    on_their_way += sum(slot.room_at is not None for slot in slots)
    needed = math.ceil(waiting_tokens / max(1, slice_tokens))
    there = sum(slot.state not in (SlotState.RESTING, SlotState.FAILED) for slot in slots)
    return resting[: max(needed - on_their_way, least_workers(slots, config) - there, 0)]


def retirable(slots: Sequence[Slot[Slice]], config: PoolConfig) -> list[Slot[Slice]]:
    """The slots whose workers may be let go, each at its ``idle_until``, while nothing waits."""
    if config.idle_timeout is None:
        return []
    ready = [slot for slot in slots if slot.state is SlotState.READY]
    idle = [slot for slot in ready if not slot.outstanding]
    spare = max(0, len(ready) - least_workers(slots, config))
    return idle[max(0, len(idle) - spare) :]


def idle_until(slot: Slot[Slice], config: PoolConfig) -> float:
    """When an idle slot's worker has had nothing to do for ``idle_timeout``."""
    assert config.idle_timeout is not None
    return slot.since + config.idle_timeout
