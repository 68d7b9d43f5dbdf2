"""How much of a training run its steps waited for data: read from the run's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from regen_dist.errors import DataError
from regen_dist.observe.record import read_record

COLD_LINES = 2  # of the log, at the start


def data_wait(run: Path) -> dict[str, float]:
    """As `waited`, of a run folder."""
    return waited(read_record(run / "metrics.jsonl", "train"))


def waited(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The share of step time that was data wait once the run is warm: over all warm steps together, and of the worst
    log line; `step_s` is the median.

    Args:
        lines: of the log, in order, each for as many steps.

    Raises:
        DataError: the run ended before it was warm.
    """
    warm = lines[COLD_LINES:]
    if not warm:
        raise DataError(f"the run has {len(lines)} lines of figures; with {COLD_LINES + 1} or more it can be judged")
    waited_s, total_s = sum(line["data_wait"] * line["step_s"] for line in warm), sum(line["step_s"] for line in warm)
    return {
        "data_wait": waited_s / total_s,
        "worst_line": max(line["data_wait"] for line in warm),
        "first_line": lines[0]["data_wait"],
        "step_s": median(line["step_s"] for line in warm),
        "warm_steps": warm[-1]["step"] - lines[COLD_LINES - 1]["step"],
    }
