"""`python -m launcher.local_executor FOLDER`: a background job on this machine, on Submitit's local executor.

The process holds a lock while it runs, which shows `regen jobs` that the job is alive. At most `array_parallelism`
tasks of an array run at a time.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import submitit

from launcher import slurm
from launcher.job import ID_FILE, Submission, read_job
from launcher.supervise import FORWARDED
from launcher.task import LOCAL_REQUEUE, LocalTask, child_environment
from regen_dist.config.files import write_text_atomically
from regen_dist.errors import EXIT_OK, EXIT_RESUME, RegenError
from regen_dist.programs import python

LOCK, LOG, EXIT_FILE = "lock", "here.log", "exit_code"
_START_S, _POLL_S = 60.0, 0.2
_NO_LIMIT_MIN = 60 * 24 * 3650  # Submitit requires a limit


def start_locally(job: Submission) -> str:
    """Start a job in the background, in its own session; return its id.

    Raises:
        RegenError: it did not start (with the end of its log).
    """
    log = job.folder / LOG
    with log.open("ab") as output:
        process = subprocess.Popen(
            python("-m", "launcher.local_executor", str(job.folder)), cwd=job.workdir, env=_environment(job),
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + _START_S
    try:
        while (found := job.id()) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace").splitlines()[-5:]
                raise RegenError("\n".join([f"the job did not start; {log} ends with:", *tail]))
            time.sleep(_POLL_S)
        return found
    except BaseException:  # also Ctrl-C: what is not submitted must not run
        process.terminate()
        process.wait()
        raise


def _environment(job: Submission) -> dict[str, str]:
    return slurm.client_environment({**child_environment(job), **job.cluster.environment})


def is_running_locally(job: Submission) -> bool:
    """Return whether the process that supervises a local job is alive."""
    try:
        with (job.folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # a disk without file locks, such as Lustre mounted without `flock`
        return _supervises(job)
    return False


def _supervises(job: Submission) -> bool:
    """Return whether the process of a job's number is one of this machine that supervises it."""
    try:
        return os.fsencode(job.folder) in Path(f"/proc/{job.id()}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("wb") as lock:
        with suppress(OSError):  # see `is_running_locally`
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Tasks:
    """The tasks of a job, each under its own Submitit controller."""

    def __init__(self, job: Submission) -> None:
        self._job, self._stopped = job, False
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._executor = submitit.LocalExecutor(job.folder / "submitit")
        self._executor.update_parameters(
            tasks_per_node=1,
            gpus_per_node=job.cluster.gpus_per_node,
            timeout_min=job.cluster.time_min or _NO_LIMIT_MIN,
            signal_delay_s=job.cluster.signal_lead_s,
        )

    def run(self) -> int:
        """Run every task to its end; return the first nonzero exit code in task order."""
        with ThreadPoolExecutor(min(self._job.cluster.array_parallelism, len(self._job.tasks))) as pool:
            codes = list(pool.map(self._run_task, range(len(self._job.tasks))))
        return next((code for code in codes if code), EXIT_OK)

    def _run_task(self, index: int) -> int:
        code = LOCAL_REQUEUE
        while code == LOCAL_REQUEUE and not self._stopped:  # Submitit restarts a task at most six times
            task = LocalTask(str(self._job.folder), index)
            task.outcome.unlink(missing_ok=True)
            process = self._start(task)
            process.wait()
            code = int(task.outcome.read_text()) if task.outcome.is_file() else RegenError.exit_code
        return EXIT_RESUME if code == LOCAL_REQUEUE else code

    def _start(self, task: LocalTask) -> subprocess.Popen[bytes]:
        started: Any = self._executor.submit(task)
        process: subprocess.Popen[bytes] = started._process
        self._running[task.index] = process
        if self._stopped:  # the signal arrived while it was being started
            process.send_signal(signal.SIGTERM)
        return process

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Forward a signal: the ranks save and end, and no further task starts."""
        self._stopped = True
        for process in self._running.values():
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)


def main(folder: Path) -> int:
    """Run a job to its end; return the exit code of its first task that did not succeed."""
    job = read_job(folder)
    tasks = _Tasks(job)
    for number in FORWARDED:
        signal.signal(number, tasks.stop)
    with _locked(job.folder):
        write_text_atomically(job.folder / ID_FILE, f"{os.getpid()}\n")
        code = tasks.run()
        write_text_atomically(job.folder / EXIT_FILE, f"{code}\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
