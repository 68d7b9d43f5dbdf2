"""Checkpoint maintenance: list, verify, prune and adopt the checkpoints of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regen_dist.checkpoint.claims import Claim, this_process
from regen_dist.checkpoint.export import open_run
from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.checkpoint.manifest import CheckpointManifest, adopt
from regen_dist.checkpoint.retention import best_first
from regen_dist.checkpoint.saver import deletable
from regen_dist.config.files import CONFIG_FILE
from regen_dist.config.run import CheckpointConfig
from regen_dist.data.storage.store import Store
from regen_dist.errors import CheckpointError
from regen_dist.observe.heartbeat import RUNNING, parse_beat, read_text

_LIVE_S = 60.0  # a newer heartbeat means that the run is training
_SHARES = 16  # parts in which the files of a checkpoint are verified, for progress messages


@dataclass(frozen=True)
class CheckpointLocation:
    """Location of a run's checkpoints.

    Args:
        folder: the checkpoint folder.
        run: the run folder; None if only the checkpoints were given and no run folder is beside them.
        policy: the retention policy of the run's config; None if unknown.
    """

    folder: CheckpointFolder
    run: Path | None
    policy: CheckpointConfig | None


def open_checkpoints(run: str) -> CheckpointLocation:
    """Open the checkpoints that a user names by a run folder, or by a folder or URL of checkpoints.

    Raises:
        CheckpointError: there is no such folder.
        ConfigError: the run's config does not validate.
        DataError: the URL cannot be used.
    """
    local = Store(run).folder
    if local is not None and not local.is_dir():
        raise CheckpointError(f"there is no folder {local}; name a run folder, or the folder or URL of its checkpoints")
    for folder in (local, None if local is None else local.parent):
        if folder is not None and (folder / CONFIG_FILE).is_file():
            config, checkpoints = open_run(folder)
            if folder == local or checkpoints.store.folder == local:
                return CheckpointLocation(checkpoints, folder, config.checkpoint)
    return CheckpointLocation(CheckpointFolder(run), None, None)


@dataclass(frozen=True)
class CheckpointEntry:
    """Committed checkpoint in a listing. `manifest` is None if it cannot be read; `problems` is empty for a good one;
    `marks` are among latest, pinned, best."""

    step: int
    manifest: CheckpointManifest | None
    problems: list[str]
    marks: list[str]

    def to_json(self) -> dict[str, Any]:
        found = self.manifest
        facts: dict[str, Any] = {"step": self.step, "marks": self.marks, "problems": self.problems}
        return facts | {
            "samples": found and found.samples,
            "saved_at": found and found.saved_at,
            "bytes": found and found.size_bytes,
            "ranks": found and found.world_size,
            "files": found and len(found.files),
            "metrics": found and found.metrics,
            "version": found and found.version,
            "config_hash": found and found.config_hash,
            "rollbacks": found and found.rollbacks,
        }


def entries(place: CheckpointLocation) -> list[CheckpointEntry]:
    """Return all committed checkpoints by step, with problems that are visible from file sizes."""
    folder, pins = place.folder, place.folder.pins()
    pointed = _pointer(folder)
    found = [_inspect(folder, step, checksums=False) for step in folder.steps()]
    newest_first = [manifest for _, manifest, _ in reversed(found) if manifest]
    best = [manifest.step for manifest in best_first(newest_first, place.policy or CheckpointConfig())[:1]]
    return [
        CheckpointEntry(
            step,
            manifest,
            problems,
            [mark for mark, holds in (("latest", step == pointed), ("pinned", step in pins), ("best", step in best))
             if holds],
        )
        for step, manifest, problems in found
    ]  # fmt: skip


def check(
    place: CheckpointLocation,
    step: int | None,
    progress: Callable[[int, int, int], None] = lambda step, done, total: None,
) -> Iterator[CheckpointEntry]:
    """Verify every byte of all committed checkpoints, or of one, yielding one after the other.

    Args:
        place: location of the checkpoints.
        step: step of the checkpoint; None verifies all.
        progress: called with (step, files checked, files).

    Raises:
        CheckpointError: there is none (of that step).
    """
    steps = place.folder.steps()
    if not steps or (step is not None and step not in steps):
        of = "" if step is None else f" of step {step}"
        held = (
            f"; there are: {', '.join(map(str, steps))}"
            if steps
            else "; give the run folder or the URL of a run that saved one"
        )
        raise CheckpointError(f"{place.folder.url} holds no committed checkpoint{of}{held}")
    return (
        CheckpointEntry(*_inspect(place.folder, each, checksums=True, progress=progress), marks=[])
        for each in (steps if step is None else [step])
    )


def dangling_pointer(place: CheckpointLocation) -> str | None:
    """Describe the problem with `latest`; None if there is none."""
    try:
        pointed = place.folder.pointer()
    except CheckpointError as error:
        return str(error)
    if pointed is None:
        return (
            "there is no pointer `latest`; a run resumes from the newest good checkpoint"
            if place.folder.steps()
            else None
        )
    return None if pointed in place.folder.steps() else f"`latest` names step {pointed}, which is not there"


def _pointer(folder: CheckpointFolder) -> int | None:
    try:
        return folder.pointer()
    except CheckpointError:  # reported by `dangling_pointer`
        return None


def _inspect(
    folder: CheckpointFolder,
    step: int,
    *,
    checksums: bool,
    progress: Callable[[int, int, int], None] = lambda step, done, total: None,
) -> tuple[int, CheckpointManifest | None, list[str]]:
    try:
        manifest = folder.manifest(step)
    except CheckpointError as error:
        return step, None, [str(error)]
    count = len(manifest.files)
    shares = min(count, _SHARES) if checksums else 1
    problems = []
    for share in range(shares):
        progress(step, share * count // shares, count)
        problems += folder.problems(manifest, checksums=checksums, share=(share, shares))
    progress(step, count, count)
    return step, manifest, sorted(problems)


@dataclass(frozen=True)
class Pruned:
    """Steps and debris folders that were deleted or would be, with their bytes."""

    steps: dict[int, int]
    debris: dict[str, int]


def prune(place: CheckpointLocation, policy: CheckpointConfig, *, dry_run: bool) -> Pruned:
    """Delete debris and the checkpoints that a policy does not keep; at least two good ones always stay.

    Raises:
        RunBusy, CheckpointError: the run is training, or holds no good checkpoint.
    """
    refuse_if_training(place)
    folder = place.folder
    newest = newest_good(folder)
    steps = [] if newest is None else deletable(folder, newest, policy)
    pruned = Pruned({step: folder.manifest(step).size_bytes for step in steps}, folder.debris())
    if not dry_run:
        for step in steps:
            folder.remove(step)
        folder.clear_debris()
    return pruned


def adopt_checkpoints(run: Path, url: str) -> CheckpointManifest:
    """Give a run folder, whose original was lost, the identity of the run that saved the checkpoints at a URL.

    Raises:
        CheckpointError: there are none.
        RunBusy: a process trains either run.
    """
    folder = CheckpointFolder(url)
    refuse_if_training(CheckpointLocation(folder, run, None))
    newest = newest_good(folder)
    if newest is None:
        raise CheckpointError(
            f"{folder.url} holds no committed checkpoint that could be taken over"
            "; give the folder or URL that has `step-N` folders"
        )
    adopt(run, newest)
    return newest


def refuse_if_training(place: CheckpointLocation) -> None:
    """Refuse to change the checkpoints of a run in training.

    Raises:
        RunBusy: a process holds the claim on the run.
        CheckpointError: a rank that has not ended wrote a heartbeat within the last minute.
    """
    me = this_process(place.run or Path.cwd())
    for claimed in dict.fromkeys([place.folder.url, *([str(place.run)] if place.run else [])]):
        Claim(claimed, me, place.folder.store.limits).refuse_if_taken()
    if place.run is None:
        return
    ages = [time.time() - modified for modified in _heartbeat_times(place.run / "heartbeats")]
    if ages and min(ages) < _LIVE_S:
        raise CheckpointError(
            f"the run {place.run} is training (its newest heartbeat is {max(0.0, min(ages)):.0f} s old), and deletes "
            f"by its own policy; stop it first, or wait {_LIVE_S:.0f} s if it was killed just now"
        )


def _heartbeat_times(folder: Path) -> Iterator[float]:
    """Yield the time of the newest heartbeat of each rank that is not known to have ended."""
    for path in folder.glob("*"):
        beat = parse_beat(read_text(path))
        if beat is None or beat.state == RUNNING:
            with suppress(FileNotFoundError):  # it is replaced every few seconds
                yield path.stat().st_mtime
