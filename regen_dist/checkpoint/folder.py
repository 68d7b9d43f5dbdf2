"""Checkpoint folder of one run, on a local or shared disk or in a bucket. Single process, no collectives.

    RUN/checkpoints/latest                                        name of the checkpoint to resume from
    RUN/checkpoints/step-00001000/manifest.json                   commits the checkpoint: written last, removed first
    RUN/checkpoints/step-00001000/rank-00000-of-00002.safetensors
    RUN/checkpoints/step-00001000/pinned                          protects it from deletion
    RUN/checkpoints/step-00002000.tmp/                            checkpoint in progress, or debris

A folder is written under a temporary name and renamed when it is complete. Buckets cannot rename: there the shards have
their final names from the start, and the manifest alone commits them. Files without a manifest are debris.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from regen_dist.checkpoint.manifest import CheckpointManifest, FileFacts, parse_manifest, to_text
from regen_dist.checkpoint.shards import ShardReader, ValueScan, write_shard
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.local import full_disk
from regen_dist.data.storage.store import Store
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError, NoGoodCheckpoint, ObjectMissing, RegenError
from regen_dist.observe.terminal import warn
from regen_dist.shared_files import remove_leftovers, sync

MANIFEST, POINTER, PIN = "manifest.json", "latest", "pinned"
_CHECKPOINT = re.compile(r"^step-(\d{8,})(\.tmp)?/(.+)$")

Phase = Callable[[str], None]


def checkpoint_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


class CheckpointFolder:
    """Checkpoints of a run: listing, verification, and the operations that the saver's protocol consists of.

    Args:
        url: a plain path, `file://`, `s3://`, `gs://` or `az://`.
        limits: time limits of a bucket.
        permit: called before a checkpoint is begun or committed; raises to forbid it.

    Raises:
        DataError: the URL cannot be used; from every method: the store does not answer, denies access, or is full.
    """

    def __init__(
        self,
        url: str | Path,
        limits: StoreLimits = StoreLimits(),  # noqa: B008 - frozen
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self._permit = Store(url, limits), permit
        self.url = self.store.url

    def steps(self) -> list[int]:
        """Return the committed steps, ascending. Their files may be damaged: see `manifest` and `problems`."""
        return sorted(step for step, temporary, file, _ in self._files() if file == MANIFEST and not temporary)

    def manifest(self, step: int) -> CheckpointManifest:
        """Read the manifest of a committed checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged or of another schema.
        """
        name = f"{checkpoint_name(step)}/{MANIFEST}"
        try:
            manifest = parse_manifest(self.store.get(name), f"checkpoint {self.url}/{name}")
        except ObjectMissing:
            raise CheckpointError(
                f"checkpoint {self.url}/{checkpoint_name(step)} has no {MANIFEST}"
                "; `regen checkpoint list RUN` shows those that can be used"
            ) from None
        if manifest.step != step:
            raise CheckpointError(f"checkpoint {self.url}/{name} is of step {manifest.step}; it was moved there")
        return manifest

    def problems(self, manifest: CheckpointManifest, *, checksums: bool, share: tuple[int, int] = (0, 1)) -> list[str]:
        """Describe problems of a checkpoint's files; empty if there are none.

        Args:
            manifest: manifest of the checkpoint.
            checksums: verify checksums and values, not only sizes.
            share: (n, of): check every `of`-th file from the n-th on, so that ranks can share the work.
        """
        found = self.store.list(f"{checkpoint_name(manifest.step)}/")
        problems = []
        for file, facts in sorted(manifest.files.items())[share[0] :: share[1]]:
            name = f"{checkpoint_name(manifest.step)}/{file}"
            size = found.get(name)
            if size != facts["bytes"]:
                held = "is missing" if size is None else f"has {size} bytes"
                problems.append(f"{file} {held}, the manifest says {facts['bytes']} bytes")
            elif checksums and (problem := self._problem_inside(name, facts["sha256"])):
                problems.append(f"{file} {problem}")
        return problems

    def reader(self, manifest: CheckpointManifest) -> ShardReader:
        return ShardReader(self.store, checkpoint_name(manifest.step), manifest)

    def pointer(self) -> int | None:
        """Return the step that `latest` names; None if there is no such file.

        Raises:
            CheckpointError: the file does not name a checkpoint.
        """
        try:
            text = self.store.get(POINTER).decode("utf-8", "replace").strip()
        except ObjectMissing:
            return None
        if not (match := re.fullmatch(r"step-(\d{8,})", text)):
            raise CheckpointError(
                f"the pointer {self.url}/{POINTER} is damaged: it says {text[:40]!r}"
                "; remove the file: the newest whole checkpoint is then found without it"
            )
        return int(match[1])

    def set_latest(self, step: int) -> None:
        self.store.put(POINTER, f"{checkpoint_name(step)}\n".encode())

    def pins(self) -> set[int]:
        """Return the pinned steps, which are never deleted."""
        return {step for step, temporary, file, _ in self._files() if file == PIN and not temporary}

    def pin(self, step: int) -> None:
        """Protect a committed checkpoint from deletion; raise CheckpointError if there is none of that step."""
        self.manifest(step)
        self.store.put(f"{checkpoint_name(step)}/{PIN}", b"")

    def unpin(self, step: int) -> None:
        """Remove the protection; the retention policy applies again."""
        self.store.delete(f"{checkpoint_name(step)}/{PIN}")

    def remove(self, step: int) -> None:
        """Delete a checkpoint, its manifest first, so that an interrupted deletion leaves debris."""
        self.store.delete(f"{checkpoint_name(step)}/{MANIFEST}")
        self._delete(checkpoint_name(step))

    def debris(self) -> dict[str, int]:
        """Return folders of uncommitted or partly deleted checkpoints with their bytes."""
        found: dict[str, int] = {}
        files = self._files()
        committed = {step for step, temporary, file, _ in files if file == MANIFEST and not temporary}
        for step, temporary, _, size in files:
            if temporary or step not in committed:
                folder = checkpoint_name(step) + temporary
                found[folder] = found.get(folder, 0) + size
        return found

    def clear_debris(self) -> None:
        """Delete uncommitted checkpoints. Must not run while another process saves. What cannot be deleted (on NFS, a
        file that somebody reads) is in no checkpoint's way: it stays, with a warning, until the next time."""
        for folder in sorted(self._empty_folders() | set(self.debris())):
            try:
                self._delete(folder)
            except (RegenError, OSError) as error:
                warn(f"{self.url}/{folder}, which is no checkpoint, was not deleted: {error}")
        if self.store.folder is not None:
            remove_leftovers(self.store.folder)

    def begin(self, step: int) -> None:
        """Prepare for a checkpoint of `step`. One of the same step from before a rollback is removed if it would be in
        the way."""
        self._permit()
        self.clear_debris()
        if self.store.folder is None and step in self.steps():
            self.store.delete(f"{checkpoint_name(step)}/{MANIFEST}")
            self._delete(checkpoint_name(step), but=PIN)

    def write_shard(self, step: int, name: str, pieces: Mapping[str, Tensor]) -> FileFacts:
        """Write one file of a checkpoint that is not committed yet; a local file is synced to disk."""
        if self.store.folder is None:
            with self.store.staging(name) as path:
                facts = _write(path, pieces)
                self.store.put_file(f"{checkpoint_name(step)}/{name}", path)
            return facts
        folder = self._temporary(step)
        with full_disk(self.store.folder, str(folder / name)):
            folder.mkdir(parents=True, exist_ok=True)
            return _write(folder / name, pieces)

    def commit(self, manifest: CheckpointManifest, phase: Phase = lambda name: None) -> None:
        """Commit the files that the manifest lists, and set `latest`. `phase` is called with the name of each phase.

        Raises:
            CheckpointError: a file is not as its rank wrote it (for example, the folder is not shared by the ranks).
        """
        self._check_written(manifest)
        self._permit()
        phase("manifest")
        text = to_text(manifest).encode()
        if self.store.folder is None:
            self.store.put(f"{checkpoint_name(manifest.step)}/{MANIFEST}", text)
        else:
            self.store.put(f"{checkpoint_name(manifest.step)}.tmp/{MANIFEST}", text)
            phase("rename")
            self._rename(manifest.step)
        phase("pointer")
        self.set_latest(manifest.step)

    def update_manifest(self, manifest: CheckpointManifest, **changes: Any) -> CheckpointManifest:
        """Replace fields of a committed checkpoint's manifest atomically and return the new manifest."""
        updated = replace(manifest, **changes)
        self.store.put(f"{checkpoint_name(manifest.step)}/{MANIFEST}", to_text(updated).encode())
        return updated

    def _rename(self, step: int) -> None:
        assert self.store.folder is not None, "buckets do not rename"
        target = self.store.folder / checkpoint_name(step)
        if target.exists():  # saved before a rollback
            if (target / PIN).exists():
                (self._temporary(step) / PIN).touch()
            self.remove(step)
        sync(self._temporary(step))
        os.replace(self._temporary(step), target)
        sync(self.store.folder)

    def _check_written(self, manifest: CheckpointManifest) -> None:
        folder = checkpoint_name(manifest.step) + ("" if self.store.folder is None else ".tmp")
        sizes = self.store.list(f"{folder}/")
        unseen = [file for file, facts in manifest.files.items() if sizes.get(f"{folder}/{file}") != facts["bytes"]]
        # NFS may list a folder as it was half a minute ago; a name that was never looked up is asked of the server.
        wrong = [file for file in unseen if self.store.size(f"{folder}/{file}") != manifest.files[file]["bytes"]]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} of {len(manifest.files)} shards are not in {self.url}/{folder} as their ranks wrote "
                f"them, among them {wrong[0]}; checkpoints must lie in a folder that all ranks share"
            )

    def _temporary(self, step: int) -> Path:
        assert self.store.folder is not None, "buckets have no temporary names"
        return self.store.folder / f"{checkpoint_name(step)}.tmp"

    def _delete(self, folder: str, but: str = "") -> None:
        if self.store.folder is not None:
            shutil.rmtree(self.store.folder / folder)
            return
        for name in self.store.list(f"{folder}/"):
            if name != f"{folder}/{but}":
                self.store.delete(name)

    def _files(self) -> list[tuple[int, str, str, int]]:
        """List all files of all checkpoints: step, ".tmp" or "", name, bytes."""
        matches = ((_CHECKPOINT.match(name), size) for name, size in self.store.list().items())
        return [(int(match[1]), match[2] or "", match[3], size) for match, size in matches if match]

    def _empty_folders(self) -> set[str]:
        """Return empty folders on a disk, left by a process killed before its first write or in a deletion."""
        if self.store.folder is None or not self.store.folder.is_dir():
            return set()
        folders = [
            path for path in self.store.folder.iterdir() if _CHECKPOINT.match(f"{path.name}/x") and path.is_dir()
        ]
        return {path.name for path in folders if not (path / MANIFEST).exists() or path.name.endswith(".tmp")}

    def _problem_inside(self, name: str, sha256: str) -> str:
        """Describe the problem with a shard's content; empty if there is none."""
        digest, scan = hashlib.sha256(), ValueScan()
        try:
            for piece in self.store.stream(name):
                digest.update(piece)
                scan.see(piece)
        except ObjectMissing:
            return "is missing"
        if digest.hexdigest() != sha256:
            return "does not have the SHA-256 in the manifest"
        return "" if scan.finite else "is intact, but holds values that are not finite: training had diverged"


def _write(path: Path, pieces: Mapping[str, Tensor]) -> FileFacts:
    with path.open("wb") as file:
        facts = write_shard(file, pieces)
        file.flush()
        os.fsync(file.fileno())
    return facts


# Choice of the checkpoint to resume from: the newest good one, agreed on by all ranks.


Log = Callable[[str], None]


class _Candidate(NamedTuple):
    """Committed checkpoint: its manifest, or the reason why it cannot be read."""

    step: int
    manifest: CheckpointManifest | None
    problem: str


def newest_good(
    folder: CheckpointFolder,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    *,
    checksums: bool = False,
    before: int | None = None,
    log: Log = warn,
) -> CheckpointManifest | None:
    """Return the checkpoint that `latest` names if it is good, else the newest good one that it was trained from.

    A collective: all ranks return the same manifest, or all raise the same error.

    Args:
        folder: the run's checkpoints.
        ranks: the ranks that share the verification.
        checksums: verify checksums, not only sizes.
        before: consider only checkpoints of steps below this.
        log: called on every rank for every rejected checkpoint, with the file and the reason.

    Returns:
        the manifest; None when the folder holds no committed checkpoint.

    Raises:
        NoGoodCheckpoint: there are checkpoints, but none is good.
        DataError: the store does not answer or denies access; this is never treated as damage.
    """
    candidates = _candidates(folder, before)
    passed_over: list[str] = []
    while (candidate := ranks.on_main(lambda: next(candidates, None))) is not None:
        problem = candidate.problem or _problem(folder, ranks, candidate.manifest, checksums)
        if not problem:
            if passed_over:
                log(f"resuming from {folder.url} at step {candidate.step}, the newest good checkpoint")
            return candidate.manifest
        log(problem)
        passed_over.append(problem)
    if passed_over:
        raise NoGoodCheckpoint(
            f"{folder.url} holds no checkpoint{'' if before is None else f' before step {before}'} that can be used: "
            f"{'; '.join(passed_over)}. Restore the files, or start the run from scratch with --fresh"
        )
    return None


def _candidates(folder: CheckpointFolder, before: int | None) -> Iterator[_Candidate]:
    """Yield the candidates in order of preference. The first needs no reading of all manifests."""
    first = pointed = None
    try:
        pointed = folder.pointer()
    except CheckpointError as error:
        yield _Candidate(-1, None, str(error))
    if pointed is not None and (before is None or pointed < before):
        first = _read(folder, pointed)
        yield first
    committed = folder.steps()
    others = sorted((_read(folder, step) for step in committed if step != pointed), key=_newest_first)
    others = [each for each in others if before is None or each.step < before]
    yield from (each for each in others if _is_ancestor(each, first, pointed))
    if pointed not in (None, *committed):  # a damaged pointer to a lower step does not exclude later ones
        yield from (each for each in others if not _is_ancestor(each, first, pointed))


def _read(folder: CheckpointFolder, step: int) -> _Candidate:
    try:
        return _Candidate(step, folder.manifest(step), "")
    except CheckpointError as error:
        return _Candidate(step, None, str(error))


def _newest_first(candidate: _Candidate) -> tuple[float, int]:
    """Return a sort key; an unreadable checkpoint counts as new, so that it is reported."""
    rollbacks = float("inf") if candidate.manifest is None else len(candidate.manifest.rollbacks)
    return -rollbacks, -candidate.step


def _is_ancestor(candidate: _Candidate, first: _Candidate | None, pointed: int | None) -> bool:
    """Return true if the checkpoint that `latest` names was trained from this one, as far as can be determined."""
    if first is not None and first.manifest is not None and candidate.manifest is not None:
        return candidate.manifest.is_followed_by(first.manifest)
    return pointed is None or candidate.step < pointed


def _problem(folder: CheckpointFolder, ranks: Ranks, manifest: CheckpointManifest | None, checksums: bool) -> str:
    """Describe problems of a checkpoint's files; empty if there are none. The ranks share the verification."""
    assert manifest is not None, "a candidate without a problem has a manifest"
    share = (ranks.rank, ranks.world_size) if checksums else (0, 1)
    own: list[str] = []
    error: RegenError | None = None
    if checksums or ranks.is_main:
        try:
            own = folder.problems(manifest, checksums=checksums, share=share)
        except RegenError as caught:
            error = caught
    ranks.raise_together(error)
    found = [problem for each in ranks.gather(own) for problem in each]
    return f"checkpoint of step {manifest.step} in {folder.url}: {'; '.join(found)}" if found else ""
