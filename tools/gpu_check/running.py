"""Runs parts of `regen gpu-check`, each in a process of its own that is ended when its time is over. Imports no
torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.local import die_with, rank_environment
from regen_dist.programs import python
from tools.gpu_check.parts import Part

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"
_TAIL_LINES = 12


def run_part(part: Part, folder: Path, *, cpu: bool, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """What became of a part.

    Args:
        part: which.
        folder: for its log, and for what it leaves.
        cpu: on the CPU, at small sizes, even where there is a GPU.
        arguments: more of the worker.

    Returns:
        `part`, `status` (passed, failed or left out), `summary`, `seconds`, `proves`, `facts`; of one that failed also
        `log`, the end of what it printed.
    """
    out, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    command = python("-m", "tools.gpu_check.worker", part.function, "--out", str(out), *(["--cpu"] if cpu else []))
    begun = time.monotonic()
    code = _ended([*command, *arguments], _environment(cpu), log, part.limit_s)
    found = _found(out, code, part.limit_s)
    told = {"part": part.name, **found, "seconds": time.monotonic() - begun, "proves": part.proves}
    if found["status"] == FAILED:
        told["log"] = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
    return told


def all_passed(results: Iterable[Mapping[str, Any]]) -> bool:
    """Whether none failed, and not all were left out."""
    statuses = [result["status"] for result in results]
    return PASSED in statuses and FAILED not in statuses


def _environment(cpu: bool) -> dict[str, str]:
    """Of a process that is a job of one rank."""
    common = rank_environment(os.environ, 1)
    return {**common, "CUDA_VISIBLE_DEVICES": ""} if cpu else common


def _ended(command: Sequence[str], environment: Mapping[str, str], log: Path, limit_s: float) -> int | None:
    """The exit code; None where its time was over and it was killed, with all that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with(os.getpid()),
        )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _found(out: Path, code: int | None, limit_s: float) -> dict[str, Any]:
    if code is None:
        return {"status": FAILED, "summary": f"not done after {limit_s:.0f} s, and ended", "facts": {}}
    if code < 0:
        return {"status": FAILED, "summary": f"ended by {signal.Signals(-code).name}", "facts": {}}
    if code or not out.is_file():
        return {"status": FAILED, "summary": f"ended with exit code {code} and without a result", "facts": {}}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found
