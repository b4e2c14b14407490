"""Other processes, which may end while one looks at them."""

from __future__ import annotations

import psutil


def command_line(process: psutil.Process) -> str:
    """The words it was started with; "" once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
