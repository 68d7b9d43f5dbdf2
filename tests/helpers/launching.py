"""Jobs by `regen submit`, runs that are held in the middle of a step, and what became of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.job import Submission, newest_job
from launcher.retry import Attempt, read_history
from regen_dist.observe.heartbeat import beat_path, parse_beat, read_text
from regen_dist.observe.record import read_record


@dataclass
class Submitter:
    """Submits as a user does: by the command line, from a folder, with an environment."""

    folder: Path
    environment: Mapping[str, str]

    def __call__(self, *arguments: object, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """`regen submit ARGUMENTS` to its end."""
        command = [sys.executable, "-m", "tools.cli", "submit", *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def job(self, base: Path, *arguments: object) -> Submission:
        """Submit, and find the submission in the folder that it belongs to."""
        ended = self(*arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        job = newest_job(base)
        assert job is not None
        return job


def wait_until(holds: Callable[[], object], otherwise: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Block until something holds; fails with what `otherwise` tells."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)


def attempts(folder: Path) -> list[Attempt]:
    """The starts of a task, and how each ended."""
    return read_history(folder / "launch")


def whys(folder: Path) -> list[str]:
    """Why each start of a task ended; "" for one that has not."""
    return [each.end.why if each.end else "" for each in attempts(folder)]


def wait_for_end(folder: Path, *, starts: int = 1, timeout_s: float = 180.0) -> str:
    """Block until a task has ended for good, after at least so many starts; why."""

    def ended() -> bool:
        history = attempts(folder)
        return len(history) >= starts and history[-1].end is not None and not history[-1].end.again

    wait_until(ended, lambda: told(folder), timeout_s)
    return whys(folder)[-1]


def told(folder: Path) -> str:
    """All that a task has said, for the message of a test that fails."""
    files = [*sorted(folder.glob("launch/starts.jsonl")), *sorted(folder.glob("launch/2*/submitit/*.err"))]
    files += sorted(folder.glob("logs/*.log"))
    return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files)


def losses(run: Path) -> dict[int, float]:
    """The loss of every step that stands in the record."""
    return {line["step"]: line["loss"] for line in read_record(run / "metrics.jsonl", "train")}


def processes(run: Path, ranks: int, since: float) -> dict[int, int]:
    """The process of each rank that has written a heartbeat after `since`."""
    found = {}
    for rank in range(ranks):
        path = beat_path(run, rank)
        beat = parse_beat(read_text(path))
        if beat and not beat.left and path.stat().st_mtime > since:
            found[rank] = beat.pid
    return found


@contextmanager
def held(run: Path, ranks: int, step: int, *, starts: int = 1, saved: bool = False) -> Iterator[dict[int, int]]:
    """Stop the ranks of start number `starts` once the run has logged `step`, so that it gets no further meanwhile.

    Args:
        saved: wait for a committed checkpoint, too: it is written beside the steps, and may come well after its own.

    Yields:
        The process of each rank. All go on afterwards, those that still are.
    """
    wait_until(lambda: len(attempts(run)) >= starts, lambda: told(run))
    since = attempts(run)[starts - 1].start.time
    wait_until(
        lambda: (
            (run / "metrics.jsonl").exists()
            and max(losses(run), default=0) >= step
            and len(processes(run, ranks, since)) == ranks
            and (not saved or any(read_record(run / "metrics.jsonl", "checkpoint")))
        ),
        lambda: told(run),
    )
    stopped = processes(run, ranks, since)
    for process in stopped.values():
        os.kill(process, signal.SIGSTOP)
    try:
        wait_until(lambda: all(map(is_stopped, stopped.values())), lambda: told(run))
        yield stopped
    finally:
        for process in stopped.values():
            _send(process, signal.SIGCONT)


def is_stopped(process: int) -> bool:
    """Whether SIGSTOP holds a process."""
    return "State:\tT" in Path(f"/proc/{process}/status").read_text()


def _send(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def has_been_told(process: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that was stopped, or it has gone on already: Slurm wakes what it tells."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return True
    if "State:\tT" not in status:
        return True
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
