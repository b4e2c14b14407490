"""Something that happens at a chosen moment of a call, as often as it takes to have seen every one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType


def interrupted(call: Callable[[], object], moment: int) -> bool:
    """Make ``call``, and raise KeyboardInterrupt, as Ctrl-C does, at its ``moment``-th moment; see ``at_moment``."""
    came_that_far = False

    def interrupt() -> None:
        nonlocal came_that_far
        came_that_far = True
        raise KeyboardInterrupt

    try:
        at_moment(call, moment, interrupt)
    except KeyboardInterrupt:
        pass
    return came_that_far


def at_moment(call: Callable[[], object], moment: int, act: Callable[[], object]) -> bool:
    """Make ``call``, and ``act`` at its ``moment``-th moment, from 1 on; whether it came that far.

    CPython looks whether there was a signal as a function starts and after each call: these are the moments.
    """
    left = moment

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "return", "c_return"):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                act()

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return left <= 0
