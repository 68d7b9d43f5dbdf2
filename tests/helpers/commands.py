"""`regen` in ranks that begin with everything imported: what `regen train --ranks 2` starts, without the seconds of its
imports and without the launcher above them."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.helpers.ranks import Started, start_ranks

RANKS = 2


def start_regen_ranks(*arguments: object, logs: Path) -> Started:
    """Start the command line in two ranks; their results are exit codes. What each prints goes to `logs/rank_N.log`."""
    return start_ranks(_regen, RANKS, list(map(str, arguments)), logs=logs)


def run_regen_ranks(*arguments: object, logs: Path, timeout_s: float = 240.0) -> list[int]:
    """The same to its end; returns the exit code of each rank."""
    with start_regen_ranks(*arguments, logs=logs) as started:
        return started.results(timeout_s)


def said(logs: Path) -> list[str]:
    """What each rank has printed until now."""
    paths = [logs / f"rank_{rank}.log" for rank in range(RANKS)]
    return [path.read_text() if path.exists() else "" for path in paths]


def _regen(arguments: list[str]) -> int:
    from tools.cli import main

    sys.argv = ["regen", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
