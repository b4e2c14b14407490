"""``python -m mp_rerank.cli``: the command, where it is not installed."""

from __future__ import annotations

import sys

from mp_rerank.cli import main

if __name__ == "__main__":
    sys.exit(main())
