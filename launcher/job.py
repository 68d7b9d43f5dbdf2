"""Submissions: one task or an array of tasks, stored in the job file that all processes read.

RUN/launch/20260131-120000/job.json       one submission; the newest sorts last
RUN/launch/20260131-120000/submitit/      the batch script and the output of Slurm and Submitit
RUN/launch/code/0123456789ab/             the copy of the code that it runs
RUN/launch/starts.jsonl                   every start and end of the task (see `launcher.attempts`)
RUN/launch/ranks/JOB-RESTART/             the exit status of each rank of one start
RUN/logs/rank_N.log                       output of a rank
RUN/STOP                                  the task does not continue while this file exists
"""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from launcher.cluster import ClusterConfig
from regen_dist.config.files import write_text_atomically
from regen_dist.config.run import PositiveInt, Section
from regen_dist.errors import RegenError
from regen_dist.jsontext import json_text

JOB_FILE, ID_FILE, LAUNCH = "job.json", "job_id", "launch"
_STAMP, _STAMP_LENGTH = "%Y%m%d-%H%M%S", 15


class TaskProgress(Section):
    """Checkpoint location of a training task, and the number of steps that completes it."""

    checkpoints: str
    steps: PositiveInt


class JobTask(Section):
    """One `regen` command and the folder of its outputs. Arguments are passed on literally."""

    name: str
    folder: Path
    command: tuple[str, ...]
    progress: TaskProgress | None = None  # training only; other commands are complete when they have succeeded

    @property
    def launch(self) -> Path:
        return self.folder / LAUNCH

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def stop_file(self) -> Path:
        return self.folder / "STOP"


class Submission(Section):
    """One submission. Every task runs on `cluster.nodes` nodes.

    `distributed`: the processes of a task are the ranks of one training; otherwise a task is one process.
    """

    name: str
    kind: Literal["train", "run", "sweep"]
    cluster: ClusterConfig
    cluster_name: str
    tasks: tuple[JobTask, ...]
    distributed: bool
    folder: Path  # of this submission
    workdir: Path  # base of relative paths in commands and configs
    code: Path
    submitted: float  # seconds since the epoch
    fingerprint: str = ""  # of its commands and configs

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1

    @property
    def world_size(self) -> int:
        return self.cluster.world_size if self.distributed else 1

    def id(self) -> str | None:
        """Return the scheduler's job id; None before submission."""
        path = self.folder / ID_FILE
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def new_folder(base: Path) -> Path:
    """Create a folder for a new submission under `base`; it sorts after all earlier ones."""
    stamp = time.strftime(_STAMP)
    earlier = (path.name[:_STAMP_LENGTH] for path in (base / LAUNCH).glob("[0-9]*"))
    newest = max((name for name in earlier if re.fullmatch(r"\d{8}-\d{6}", name)), default="")
    if newest > stamp:  # the clock was set back, or this machine is in another time zone
        stamp = (datetime.strptime(newest, _STAMP) + timedelta(seconds=1)).strftime(_STAMP)
    for suffix in ["", *(f"-{number:02d}" for number in range(1, 100))]:
        folder = base / LAUNCH / f"{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise RegenError(f"a hundred submissions within a second in {base / LAUNCH}; wait a second, then submit again")


def write_job(job: Submission) -> None:
    """Write the job file that the job's processes and `regen jobs` read."""
    write_text_atomically(job.folder / JOB_FILE, json_text(job.model_dump(mode="json"), indent=1) + "\n")


def read_job(folder: Path) -> Submission:
    """Return the job of one submission.

    Raises:
        RegenError: there is no job file, or it was written by another version.
    """
    path = folder / JOB_FILE
    try:
        return Submission.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RegenError(f"{path}: not found; give the folder of a submission, RUN/launch/DATE") from None
    except ValidationError as error:
        raise RegenError(f"{path}: not a job of this version ({error.error_count()} problems); submit again") from error


def newest_job(base: Path) -> Submission | None:
    """Return the newest submission of a run or an array in `base`; None if there is none."""
    folders = sorted(path.parent for path in (base / LAUNCH).glob(f"*/{JOB_FILE}"))
    return read_job(folders[-1]) if folders else None
