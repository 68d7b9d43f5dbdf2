"""How each rank of a start ended: one small file a rank, written by the process above it, which outlives a rank that is
killed."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from regen_dist.config.files import write_text_atomically
from regen_dist.config.section import Section


class RankEnd(Section):
    """A rank's exit code (128+n where signal n ended it), and what it had been told until then."""

    rank: int
    node: str
    code: int
    told: tuple[str, ...] = ()  # signals, in their order
    time: float


def folder(launch: Path, job: str, restart: int) -> Path:
    """Where the ranks of one start leave their word."""
    return launch / "ranks" / f"{job}-{restart}"


def write(launch: Path, job: str, restart: int, *, rank: int, node: str, code: int, told: Sequence[str]) -> None:
    """Leave word of a rank that has ended; where the disk takes none, it is said, and known of its exit code alone."""
    ended = RankEnd(rank=rank, node=node, code=code, told=tuple(told), time=time.time())
    try:
        write_text_atomically(folder(launch, job, restart) / f"rank-{rank:05d}.json", ended.model_dump_json() + "\n")
    except OSError as error:
        print(f"launcher: warning: no word is left of the end of rank {rank} ({code}): {error}", file=sys.stderr)


def prune(launch: Path, keep: int = 3) -> None:
    """Delete what the ranks of older starts have left: hundreds of files each."""
    folders = sorted((launch / "ranks").glob("*"), key=lambda each: each.stat().st_mtime)
    for old in folders[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def read(launch: Path, job: str, restart: int, world_size: int) -> list[RankEnd | None]:
    """What the ranks of a start have left, in the order in which they ended; None for each that left no word."""
    found = []
    for path in folder(launch, job, restart).glob("rank-*.json"):
        try:
            found.append(RankEnd.model_validate_json(path.read_text(encoding="utf-8")))
        except (OSError, ValidationError):
            continue
    silent: list[RankEnd | None] = [None] * (world_size - len(found))
    return [*sorted(found, key=lambda each: each.time), *silent]


def hung_hosts(run: Path) -> set[str]:
    """The hosts of the ranks that stood still when the run ended with the exit code of a hang."""
    try:
        told = json.loads((run / "hang.json").read_text(encoding="utf-8"))
        return {each["host"].partition(".")[0] for each in told["ranks"]} if told["kind"] != "together" else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()
