"""`regen jobs logs`: what ranks, or the launcher above them, have said."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from launcher import here
from launcher.history import read_history
from launcher.jobs.finding import Member, shown_name
from launcher.jobs.queue import ask
from launcher.jobs.standing import standing
from regen_dist.errors import ConfigError

_BLOCK_BYTES = 2**16


def pick(members: Sequence[Member], root: Path) -> Member:
    """The one task whose log is meant.

    Raises:
        ConfigError: there are several (names those that failed first).
    """
    if len(members) == 1:
        return members[0]
    queue = ask(members)
    stands = sorted(((standing(each, queue).state, each) for each in members), key=lambda pair: pair[0] != "failed")
    names = [f"{shown_name(each.task.folder, root)} ({state})" for state, each in stands]
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    raise ConfigError(f"there are {len(names)} tasks; give one of them: {', '.join(names[:5])}{more}")


def rank_log(member: Member, rank: int) -> Path:
    """What a rank prints."""
    return member.task.logs / f"rank_{rank}.log"


def launcher_logs(member: Member) -> list[Path]:
    """What the batch script, srun and Submitit have said of the newest submission, and the process that stands for it
    on this machine; those that are empty left out."""
    names = [member.queue_id]
    if member.job.cluster.kind == "local":
        names = [each.start.job for each in read_history(member.task.launch)]
    said = [path for name in names for path in sorted((member.job.folder / "submitit").glob(f"{name}_*_log.*"))]
    if member.job.cluster.kind == "slurm":  # "12_0_log.err" is of task 0 in an array, or of node 0 without one
        said = sorted((member.job.folder / "submitit").glob(f"{member.queue_id}_[0-9]*_log.*"))
    return [path for path in [*said, member.job.folder / here.LOG] if path.is_file() and path.stat().st_size]


def sources(member: Member, rank: int | None, *, launcher: bool) -> list[Path]:
    """The files to show: a rank's log, or the launcher's where none is asked for and rank 0 has none."""
    log = rank_log(member, rank or 0)
    if log.is_file() and not launcher:
        return [log]
    return launcher_logs(member) if launcher or rank is None else []


def show(member: Member, rank: int | None, *, launcher: bool, lines: int) -> None:
    """Print the ends of the files.

    Raises:
        ConfigError: there are none.
    """
    files = sources(member, rank, launcher=launcher)
    if not files:
        raise ConfigError(_silent(member, rank))
    for path in files:
        if len(files) > 1:
            print(f"==> {path} <==")
        for line in last_lines(path, lines):
            print(line)


def _silent(member: Member, rank: int | None) -> str:
    known = sorted(int(path.stem.removeprefix("rank_")) for path in member.task.logs.glob("rank_*.log"))
    if rank is not None and known:
        return f"{rank_log(member, rank)}: not there; there are logs of ranks {known[0]} to {known[-1]}"
    return (
        f"{member.task.name} has no such log yet; `regen jobs` tells how it stands, --launcher what it was started by"
    )


def last_lines(path: Path, count: int) -> list[str]:
    """The newest lines of a file, read from its end."""
    text = newest(path, count).removesuffix(b"\n").decode("utf-8", "replace")
    return [visible(line) for line in text.split("\n")] if text else []


def newest(path: Path, count: int) -> bytes:
    """The last `count` lines of a file, as they are."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        found = b""
        while position and found.count(b"\n") <= count:
            size = min(_BLOCK_BYTES, position)
            position = file.seek(position - size)
            found = file.read(size) + found
    kept = count + found.endswith(b"\n")
    return b"\n".join(found.split(b"\n")[-kept:])


def visible(line: str) -> str:
    """What a terminal shows in the end of a line that was written over itself, as progress bars do."""
    return next((piece for piece in reversed(line.split("\r")) if piece), "")
