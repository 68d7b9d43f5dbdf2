"""`--task` of the commands that several processes share: which part of the work falls to this one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from regen_dist.errors import ConfigError


def parse_task(text: str, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Read "I/N" (I counts from 0), or "slurm": both from the Slurm array that this process belongs to.

    Raises:
        ConfigError: it is neither, I is not below N, or there is no Slurm array.
    """
    number, count = _slurm(environ) if text == "slurm" else _written(text)
    if not 0 <= number < count:
        raise ConfigError(f"--task {number}/{count}: {count} tasks are numbered 0 to {count - 1}")
    return number, count


def _written(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
    if not match:
        raise ConfigError(f"--task {text}: write I/N, as 0/8 for the first of eight, or slurm inside a Slurm array")
    return int(match[1]), int(match[2])


def _slurm(environ: Mapping[str, str]) -> tuple[int, int]:
    """An array may begin anywhere and go in steps: --array=4-10:2 has four tasks."""
    try:
        number, first, count = (int(environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT"))
        step = int(environ.get("SLURM_ARRAY_TASK_STEP", "1"))
    except (KeyError, ValueError):
        raise ConfigError(
            "--task slurm: SLURM_ARRAY_TASK_ID, _MIN and _COUNT are not set; submit with sbatch --array=0-7, or "
            "give --task I/N"
        ) from None
    return (number - first) // step, count
