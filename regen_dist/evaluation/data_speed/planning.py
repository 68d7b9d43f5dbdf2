"""How long planning takes, and in how much memory. `python -m` of this module plans in a process of its own, for the
peak memory of a process never falls."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from regen_dist.data.order.order import Bucket, Order, Stream
from regen_dist.jsontext import json_text
from regen_dist.programs import python

BATCH = 8192
_WEIGHTS = (1.0, 2.0, 3.0)
_BUCKETS = 6


def plan(samples: int, *, mixed: bool) -> dict[str, float]:
    """Plan one epoch of `samples` samples in global batches of 8192: one line of all, or six buckets of three datasets.

    Returns:
        `seconds` from nothing to the last batch; `peak_mb`, the process's highest memory, `before_mb`, the same before
        it planned anything.
    """
    command = python("-m", __name__, str(samples), "mixed" if mixed else "one")
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return found


def make_order(samples: int, *, mixed: bool) -> Order:
    """The order that is planned."""
    if not mixed:
        return Order.single(samples, BATCH, seed=0)
    each = samples // (_BUCKETS * len(_WEIGHTS))
    buckets = [Bucket(64, 64 + 16 * number, 17) for number in range(_BUCKETS)]
    return Order([Stream(bucket, (each,) * len(_WEIGHTS)) for bucket in buckets], BATCH, 0, _WEIGHTS)


def _measure(samples: int, *, mixed: bool) -> dict[str, float]:
    before, begun = _peak_mb(), time.perf_counter()
    order = make_order(samples, mixed=mixed)
    for step in range(-(-samples // BATCH)):
        order.global_batch(step)
    return {"seconds": time.perf_counter() - begun, "peak_mb": _peak_mb(), "before_mb": before}


def _peak_mb() -> float:
    """Of this program. `getrusage` would give that of the process that started it, where that is larger."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    print(json_text(_measure(int(sys.argv[1]), mixed=sys.argv[2] == "mixed")))
