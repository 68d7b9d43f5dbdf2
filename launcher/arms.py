"""Several commands side by side on this machine, each with its log; what is done already is skipped by the commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from regen_dist.distributed.environment import without_ranks
from regen_dist.errors import EXIT_RESUME, TrainingError


def run_side_by_side(
    commands: Mapping[str, Sequence[str]], *, logs: Path, at_once: int, done: Callable[[str], None] = lambda name: None
) -> None:
    """Run every command, `at_once` at a time with an equal share of the cores each; `done(name)` is told as they end.

    Where this is interrupted, nothing more is started, and what runs is told to end (SIGTERM) and waited for.

    Raises:
        TrainingError: some failed (the others have still run); names them and their logs.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    environment = {**without_ranks(os.environ), "OMP_NUM_THREADS": str(threads)}

    running: dict[str, subprocess.Popen[bytes]] = {}
    starting, stopping = Lock(), Event()

    def run(name: str) -> int:
        with (logs / f"{name}.log").open("ab") as log, starting:
            if stopping.is_set():
                return EXIT_RESUME
            running[name] = subprocess.Popen(commands[name], env=environment, stdout=log, stderr=log)
        code = running[name].wait()
        if not stopping.is_set():
            done(name)
        return code

    with ThreadPoolExecutor(at_once) as pool:
        try:
            codes = dict(zip(commands, pool.map(run, commands), strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            with starting:
                stopping.set()
                for process in running.values():
                    process.terminate()  # nothing where it has ended
            raise
    if failed := {name: code for name, code in codes.items() if code}:
        listed = ", ".join(f"{name} (exit code {code}, see {logs / name}.log)" for name, code in failed.items())
        raise TrainingError(f"{len(failed)} of {len(codes)} runs failed: {listed}")
