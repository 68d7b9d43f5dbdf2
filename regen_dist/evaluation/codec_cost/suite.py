"""Every codec at every size, each in a process of its own, in turn."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from regen_dist.evaluation.codec_cost import worker
from regen_dist.evaluation.codec_cost.sizes import Size
from regen_dist.evaluation.codec_cost.systems import System
from regen_dist.evaluation.codec_cost.worker import Job
from regen_dist.jsontext import json_text
from regen_dist.programs import python

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CALLS = ("encode", "decode")


@dataclass(frozen=True)
class Limits:
    """What a process may take, and how it works.

    Attributes:
        seconds: until it is ended, loading included.
        gib: of memory.
        threads: of torch.
        repeats: passes that are timed, after one that is not.
        precision: "fp32" or "bf16".
        packages: a folder with packages that are not installed, or "".
    """

    seconds: float
    gib: float
    threads: int
    repeats: int
    precision: str
    packages: str = ""

    def job(self, do: Literal["count", "measure"], system: System, sizes: Sequence[Size]) -> Job:
        """What the process is told."""
        asked = [str(size) for size in sizes]
        limit = int(self.gib * 2**30)
        return Job(do, system.name, asked, self.precision, self.threads, self.repeats, limit, self.packages)


def measure_all(
    systems: Sequence[System],
    sizes: Sequence[Size],
    counted: Sequence[Size],
    limits: Limits,
    *,
    rounds: int,
    told: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each size and codec; those at sizes that are `counted` alone have no seconds.

    Args:
        systems: the codecs.
        sizes: at which they run.
        counted: at which their operations are counted, too.
        limits: of each process.
        rounds: how often everything is run.
        told: hears of what goes on.
    """
    rows = {(size, system.name): _row(system, size) for size in [*sizes, *counted] for system in systems}
    for system in systems:
        told(f"counting {system.name}")
        for size, found in _counts(system, list(dict.fromkeys([*sizes, *counted])), limits):
            rows[size, system.name] |= found
    passes: dict[tuple[Size, str], list[dict[str, Any]]] = {}
    for number in range(rounds):
        for size in sizes:
            for system in systems:
                told(f"round {number + 1} of {rounds}: {system.name} at {size}")
                passes.setdefault((size, system.name), []).extend(run(limits.job("measure", system, [size]), limits))
    for key, told_of in passes.items():
        rows[key] |= summary(told_of)
    return list(rows.values())


def run(job: Job, limits: Limits) -> list[dict[str, Any]]:
    """What the process told; the last line says so where it was ended, or ended itself without a word."""
    command = python("-W", "ignore", "-m", worker.__name__, json_text(job._asdict()))
    environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(limits.threads))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, errors = process.communicate(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            return [*_lines(out), {"problem": f"past the limit of {limits.seconds:g} s"}]
        except BaseException:
            process.kill()
            raise
    found = list(_lines(out))
    if process.returncode:
        found.append({"problem": f"ended with code {process.returncode}: {(errors.strip().splitlines() or ['-'])[-1]}"})
    return found


def _lines(out: str) -> Iterator[dict[str, Any]]:
    """Whole lines; a process that is ended may leave a part of one."""
    for line in out.splitlines(keepends=True):
        if line.startswith("{") and line.endswith("}\n"):
            yield json.loads(line)


def _row(system: System, size: Size) -> dict[str, Any]:
    row = {"system": system.name, "own": system.is_own, "temporal_compression": system.temporal_compression}
    return row | {"size": list(size)}


def _counts(system: System, sizes: list[Size], limits: Limits) -> Iterator[tuple[Size, dict[str, Any]]]:
    """What is known of a codec at each size without running it, or why it is not."""
    told = run(limits.job("count", system, sizes), limits)
    counted = {line["size"]: line for line in told if "size" in line}
    ended = next((line["problem"] for line in reversed(told) if "problem" in line), "it said nothing")
    for size in sizes:
        line = counted.get(str(size), {"problem": ended})
        yield size, line["counted"] if "counted" in line else {"not_counted": line["problem"]}


def summary(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all passes of a codec at a size: medians of seconds, the most memory, and what went wrong.

    The first pass of a process does not count, unless it is the only one.
    """
    found: dict[str, Any] = {}
    for call in _CALLS:
        lines = [line for line in told if call in line]
        later = [line[call] for line in lines if line["number"]] or [line[call] for line in lines]
        if later:
            found[call] = {name: _spread([each[name] for each in later]) for name in ("wall_s", "cpu_s")}
            peaks = [line[call]["peak_bytes"] for line in lines if line[call]["peak_bytes"] is not None]
            found[call] |= {"peak_bytes": max(peaks) if peaks else None, "passes": len(later)}
    problems = [line["problem"] for line in told if "problem" in line]
    base = [line["base_bytes"] for line in told if line.get("base_bytes") is not None]
    return found | ({"base_bytes": max(base)} if base else {}) | ({"problem": problems[0]} if problems else {})


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}
