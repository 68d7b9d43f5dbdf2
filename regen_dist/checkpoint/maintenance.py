"""What a person does with the checkpoints of a run: look at them, check them, delete what is no longer wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regen_dist.checkpoint.claims import Claim, this_process
from regen_dist.checkpoint.export import open_run
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.identity import adopt
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.reader import newest_good
from regen_dist.checkpoint.retention import best_first
from regen_dist.checkpoint.saver import deletable
from regen_dist.config.files import CONFIG_FILE
from regen_dist.config.run import CheckpointConfig
from regen_dist.data.storage.store import Store
from regen_dist.errors import CheckpointError
from regen_dist.observe.heartbeat import RUNNING, parse_beat, read_text

_LIVE_S = 60.0  # a heartbeat newer than this is a run's that trains
_SHARES = 16  # in which the files of a checkpoint are checked, for the progress


@dataclass(frozen=True)
class CheckpointPlace:
    """Where a run's checkpoints are.

    Args:
        folder: of the checkpoints.
        run: the run's folder; None where only the checkpoints were named, and it is not beside them.
        policy: of the run's config; None where that is not known.
    """

    folder: CheckpointFolder
    run: Path | None
    policy: CheckpointConfig | None


def open_place(run: str) -> CheckpointPlace:
    """What a user names: a run folder, or a folder or URL that holds checkpoints.

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
                return CheckpointPlace(checkpoints, folder, config.checkpoint)
    return CheckpointPlace(CheckpointFolder(run), None, None)


@dataclass(frozen=True)
class Entry:
    """A committed checkpoint as it is listed. `manifest` is None when it cannot be read; `problems` is empty when
    nothing is wrong; `marks` are among latest, pinned, best."""

    step: int
    manifest: CheckpointManifest | None
    problems: list[str]
    marks: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for what is not known."""
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


def entries(place: CheckpointPlace) -> list[Entry]:
    """Every committed checkpoint, by step; what is wrong with it as far as sizes tell."""
    folder, pins = place.folder, place.folder.pins()
    pointed = _pointer(folder)
    found = [_look(folder, step, checksums=False) for step in folder.steps()]
    newest_first = [manifest for _, manifest, _ in reversed(found) if manifest]
    best = [manifest.step for manifest in best_first(newest_first, place.policy or CheckpointConfig())[:1]]
    return [
        Entry(
            step,
            manifest,
            problems,
            [mark for mark, holds in (("latest", step == pointed), ("pinned", step in pins), ("best", step in best))
             if holds],
        )
        for step, manifest, problems in found
    ]  # fmt: skip


def check(
    place: CheckpointPlace, step: int | None, progress: Callable[[int, int, int], None] = lambda step, done, total: None
) -> Iterator[Entry]:
    """Read every byte of every committed checkpoint, or of that of one step, one after the other.

    Args:
        place: the run's.
        step: None checks all of them.
        progress: told (step, files checked, files).

    Raises:
        CheckpointError: there is none (of that step).
    """
    steps = place.folder.steps()
    if not steps or (step is not None and step not in steps):
        of = "" if step is None else f" of step {step}"
        held = f"; there are: {', '.join(map(str, steps))}" if steps else ""
        raise CheckpointError(f"{place.folder.url} holds no committed checkpoint{of}{held}")
    return (
        Entry(*_look(place.folder, each, checksums=True, progress=progress), marks=[])
        for each in (steps if step is None else [step])
    )


def dangling_pointer(place: CheckpointPlace) -> str | None:
    """What is wrong with `latest`, in words; None when nothing is."""
    try:
        pointed = place.folder.pointer()
    except CheckpointError as error:
        return str(error)
    if pointed is None:
        return (
            "there is no pointer `latest`; a run goes on from the newest good checkpoint"
            if place.folder.steps()
            else None
        )
    return None if pointed in place.folder.steps() else f"`latest` names step {pointed}, which is not there"


def _pointer(folder: CheckpointFolder) -> int | None:
    try:
        return folder.pointer()
    except CheckpointError:  # told by `dangling_pointer`
        return None


def _look(
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
    """What was deleted, or would be: steps and folders of debris, with their bytes."""

    steps: dict[int, int]
    debris: dict[str, int]


def prune(place: CheckpointPlace, policy: CheckpointConfig, *, dry_run: bool) -> Pruned:
    """Delete what a policy does not keep, and debris. Never below two good checkpoints.

    Raises:
        RunBusy, CheckpointError: the run is training, or holds no good checkpoint.
    """
    refuse_live(place)
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
    """Make the run in a folder, whose own was lost, the one that saved the checkpoints at a place.

    Raises:
        CheckpointError: there are none.
        RunBusy: a process trains one of both.
    """
    folder = CheckpointFolder(url)
    refuse_live(CheckpointPlace(folder, run, None))
    newest = newest_good(folder)
    if newest is None:
        raise CheckpointError(f"{folder.url} holds no committed checkpoint that could be taken over")
    adopt(run, newest)
    return newest


def refuse_live(place: CheckpointPlace) -> None:
    """RunBusy when a process trains this run; CheckpointError when a rank of it that has not ended gave a sign of life
    within the last minute."""
    me = this_process(place.run or Path.cwd())
    for claimed in dict.fromkeys([place.folder.url, *([str(place.run)] if place.run else [])]):
        Claim(claimed, me, place.folder.store.limits).refuse_living()
    if place.run is None:
        return
    ages = [time.time() - modified for modified in _beats(place.run / "heartbeats")]
    if ages and min(ages) < _LIVE_S:
        raise CheckpointError(
            f"the run {place.run} is training (its newest heartbeat is {max(0.0, min(ages)):.0f} s old), and deletes "
            f"by its own policy; stop it first, or wait {_LIVE_S:.0f} s if it was killed just now"
        )


def _beats(folder: Path) -> Iterator[float]:
    """When each rank that is not known to have ended wrote its newest heartbeat."""
    for path in folder.glob("*"):
        beat = parse_beat(read_text(path))
        if beat is None or beat.state == RUNNING:
            with suppress(FileNotFoundError):  # it is replaced every few seconds
                yield path.stat().st_mtime
