"""Processes that run on this machine because of another: its children and theirs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def descendants(process_id: int) -> list[int]:
    """Every process that it started, and that those started, as far as they still run."""
    found: list[int] = []
    for children in Path(f"/proc/{process_id}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread or the process has ended meanwhile
            found += map(int, children.read_text().split())
    return [*found, *(each for child in found for each in descendants(child))]


def runs(process_id: int) -> bool:
    """Whether a process is there, and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(process_ids: Sequence[int], timeout_s: float = 20.0) -> None:
    """Block until none of them runs; fails when one does for longer.

    A process that got SIGKILL still runs for a moment: a test waits, it never asks at once.
    """
    deadline = time.monotonic() + timeout_s
    while left := [process_id for process_id in process_ids if runs(process_id)]:
        assert time.monotonic() < deadline, f"{left} still run after {timeout_s:.0f} s"
        time.sleep(0.02)
