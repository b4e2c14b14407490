"""Ctrl-C at a chosen moment, as often as it takes to have seen every one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType


def interrupted(call: Callable[[], object], moment: int) -> bool:
    """Make ``call``, and raise KeyboardInterrupt at the ``moment``-th chance from 1 on; whether it came that far.

    CPython looks whether there was a signal as a function starts and after each call: so does this, and nowhere else.
    """
    left = moment

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "return", "c_return"):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return left <= 0
