"""Warnings for the user: one line each on stderr."""

from __future__ import annotations

import sys


def warn(text: str) -> None:
    """Print a warning on stderr at once."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
