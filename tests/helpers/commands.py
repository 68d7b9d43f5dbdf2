"""`regen` in ranks that begin with everything imported: what `regen train --ranks 2` starts, without the seconds of its
imports and without the launcher above them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from regen_dist.distributed.environment import without_ranks
from tests.helpers.ranks import Started, start_ranks

RANKS = 2


def start_regen_ranks(*arguments: object, logs: Path) -> Started:
    """Start the command line in two ranks; their results are exit codes. What each prints goes to `logs/rank_N.log`."""
    return start_ranks(_regen, RANKS, list(map(str, arguments)), logs=logs)


def run_regen_ranks(*arguments: object, logs: Path, timeout_s: float = 240.0) -> list[int]:
    """The same to its end; returns the exit code of each rank."""
    with start_regen_ranks(*arguments, logs=logs) as started:
        return started.results(timeout_s, codes=True)


def run_regen_alone(*arguments: object, logs: Path, timeout_s: float = 240.0) -> int:
    """The command line in one process that is no rank, as a user's shell starts it, to its end; returns its exit code.
    What it prints is in `logs/rank_0.log`."""
    with start_ranks(_regen_alone, 1, list(map(str, arguments)), logs=logs) as started:
        return int(started.results(timeout_s, codes=True)[0])


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


def _regen_alone(arguments: list[str]) -> int:
    left = without_ranks(os.environ)
    for name in [name for name in os.environ if name not in left]:
        del os.environ[name]
    return _regen(arguments)
