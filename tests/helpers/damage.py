"""Checkpoints that something happened to, and what the ranks of a job make of them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.distributed.ranks import Ranks, process_group, read_environment
from regen_dist.errors import RegenError


class Damage(NamedTuple):
    """What happens to one file. `name` is its name in the checkpoint folder; `at` is where it is cut, or which of its
    bytes gets the bit `bit` flipped; counted from the end when negative."""

    name: str
    kind: Literal["deleted", "cut", "flipped"]
    at: int = 0
    bit: int = 0

    def inflict(self, store: Store) -> None:
        """Do it."""
        if self.kind == "deleted":
            store.delete(self.name)
            return
        data = bytearray(store.get(self.name))
        if self.kind == "cut":
            del data[self.at :]
        else:
            data[self.at] ^= 1 << self.bit
        store.put(self.name, bytes(data))


class Case(NamedTuple):
    """Damages, and variables that every rank has meanwhile."""

    damages: tuple[Damage, ...] = ()
    environment: Mapping[str, str] = {}


class Answer(NamedTuple):
    """What one rank came to: the step to go on from (None: there is no checkpoint), what it said, and the error."""

    step: int | None
    said: list[str]
    error: str
    exit_code: int
    seconds: float


def ask(url: str, cases: Sequence[Case], limits: StoreLimits) -> list[Answer]:
    """What a rank of `run_ranks` does: look for the newest whole checkpoint in each case. The damages are undone after
    each."""
    ranks = read_environment()
    with process_group(ranks, needed=True):
        return [_asked_about(url, case, limits, ranks) for case in cases]


def _asked_about(url: str, case: Case, limits: StoreLimits, ranks: Ranks) -> Answer:
    store = Store(url)
    whole: dict[str, bytes] = {}
    if ranks.is_main:
        whole = {damage.name: store.get(damage.name) for damage in case.damages}
        for damage in case.damages:
            damage.inflict(store)
    ranks.barrier()
    before = dict(os.environ)
    os.environ.update(case.environment)
    answer = _answer(CheckpointFolder(url, limits), ranks)
    os.environ.clear()
    os.environ.update(before)
    ranks.barrier()
    for name, data in whole.items():
        store.put(name, data)
    return answer


def _answer(folder: CheckpointFolder, ranks: Ranks) -> Answer:
    said: list[str] = []
    began = time.monotonic()
    step, problem, exit_code = None, "", 0
    try:
        manifest = newest_good(folder, ranks, checksums=True, log=said.append)
        step = None if manifest is None else manifest.step
    except RegenError as error:
        problem, exit_code = f"{type(error).__name__}: {error}", error.exit_code
    return Answer(step, said, problem, exit_code, time.monotonic() - began)


def flip(path: Path, at: int = -1) -> None:
    """Change one byte of a file in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
