"""What is submitted: a job of one task or of an array of them, as the file that all its processes read.

RUN/launch/20260131-120000/job.json       one submission; the newest has the greatest name
RUN/launch/20260131-120000/submitit/      the batch script, and what Slurm and Submitit say themselves
RUN/launch/code/0123456789ab/             the code that it runs
RUN/launch/starts.jsonl                   every start and every end of the task (see `history`)
RUN/launch/ranks/JOB-RESTART/             how each rank of a start ended
RUN/logs/rank_N.log                       what a rank printed
RUN/STOP                                  while it is there, the task does not go on
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from launcher.cluster import ClusterConfig
from regen_dist.config.files import write_text_atomically
from regen_dist.config.run import PositiveInt, Section
from regen_dist.errors import RegenError
from regen_dist.jsontext import json_text

JOB_FILE, ID_FILE, LAUNCH = "job.json", "job_id", "launch"


class Progress(Section):
    """Where a training task's checkpoints are committed, and how many steps make it complete."""

    checkpoints: str
    steps: PositiveInt


class JobTask(Section):
    """One command of `regen`, and the folder in which it leaves its traces. Arguments are passed on literally."""

    name: str
    folder: Path
    command: tuple[str, ...]
    progress: Progress | None = None  # of training; other commands are complete when they ended well

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
    """A submission. Every task runs on `cluster.nodes` nodes.

    `distributed`: the processes of a task are the ranks of one training; otherwise there is one process.
    """

    name: str
    kind: Literal["train", "run", "sweep"]
    cluster: ClusterConfig
    cluster_name: str
    tasks: tuple[JobTask, ...]
    distributed: bool
    folder: Path  # of this submission
    workdir: Path  # relative paths in commands and configs count from here
    code: Path
    submitted: float  # seconds since the epoch
    fingerprint: str = ""  # of what it runs

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1

    @property
    def world_size(self) -> int:
        return self.cluster.world_size if self.distributed else 1

    def id(self) -> str | None:
        """What the scheduler calls it; None before it was submitted."""
        path = self.folder / ID_FILE
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def new_folder(base: Path) -> Path:
    """A folder for one more submission under `base`, later in the alphabet than those before it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{number:02d}" for number in range(1, 100))]:
        folder = base / LAUNCH / f"{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise RegenError(f"a hundred submissions within a second in {base / LAUNCH}")


def write_job(job: Submission) -> None:
    """Leave a job where its processes, and `regen jobs`, find it."""
    write_text_atomically(job.folder / JOB_FILE, json_text(job.model_dump(mode="json"), indent=1) + "\n")


def read_job(folder: Path) -> Submission:
    """The job of one submission.

    Raises:
        RegenError: there is none, or it is of another version.
    """
    path = folder / JOB_FILE
    try:
        return Submission.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RegenError(f"{path}: not there; give the folder of a submission, RUN/launch/DATE") from None
    except ValidationError as error:
        raise RegenError(f"{path}: not a job of this version ({error.error_count()} problems); submit again") from error


def newest_job(base: Path) -> Submission | None:
    """The newest submission of a run or of an array in `base`; None when there is none."""
    folders = sorted(path.parent for path in (base / LAUNCH).glob(f"*/{JOB_FILE}"))
    return read_job(folders[-1]) if folders else None
