"""The commit protocol: a checkpoint exists as a whole or not at all.

    every rank writes its shard into `step-N.tmp/`  ->  all ranks agree that they succeeded  ->  rank 0 writes
    `manifest.json`
    ->  rename to `step-N/`  ->  the pointer `latest`, atomically, last  ->  only then older ones are deleted

Layout: RUN/checkpoints/latest, RUN/checkpoints/step-00001000/{manifest.json, rank-00000-of-00002.safetensors, ...}
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from regen_dist import __version__
from regen_dist.checkpoint.shards import ShardReader, shard_name, write_shard
from regen_dist.config.files import write_text_atomically
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError

SCHEMA = 1


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says of itself. `state` is whatever the run needs besides tensors (counters, the
    data's place)."""

    schema: int
    step: int
    world_size: int
    config_hash: str
    version: str
    state: dict[str, Any]
    shapes: dict[str, list[int]]
    files: dict[str, dict[str, Any]]  # name to {bytes, sha256}


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run: Path, ranks: Ranks | None = None) -> None:
        self.folder, self.ranks = run / "checkpoints", ranks or Ranks()

    def save(
        self,
        step: int,
        pieces: dict[str, Tensor],
        shapes: dict[str, list[int]],
        state: dict[str, Any],
        config_hash: str,
        keep: int,
    ) -> None:
        """Commit a checkpoint; nothing to do when the pointer names that step already. A collective; raises on every
        rank when any rank failed, and then the older checkpoints are untouched.

        Raises:
            CheckpointError: some rank could not write its shard.
        """
        if self.ranks.agree(self.ranks.is_main and self._is_latest(step)):
            return  # a run that was stopped right after it resumed
        temporary = self.folder / f"{_name(step)}.tmp"
        if self.ranks.is_main:
            self._clear_debris()
            temporary.mkdir(parents=True, exist_ok=True)
        self.ranks.barrier()
        error = _attempt(temporary / shard_name(self.ranks.rank, self.ranks.world_size), pieces)
        if self.ranks.agree(error is not None):
            raise CheckpointError(f"step {step} was not saved: {error or 'another rank failed, see its log'}")
        if self.ranks.is_main:
            self._commit(temporary, step, shapes, state, config_hash)
            self._prune(step, keep)
        self.ranks.barrier()

    def latest(self) -> Manifest | None:
        """The newest committed checkpoint, or None when the run has none.

        Raises:
            CheckpointError: there are committed checkpoints, but the one that the pointer names is missing or damaged.
        """
        pointer = self.folder / "latest"
        if not pointer.exists():
            if found := self.steps():
                raise CheckpointError(
                    f"{self.folder} holds {len(found)} checkpoints but no pointer `latest`; write one's name into it"
                )
            return None
        return self.manifest(pointer.read_text(encoding="utf-8").strip())

    def manifest(self, name: str) -> Manifest:
        """Read and check a manifest: every file is there with its size."""
        folder = self.folder / name
        try:
            manifest = Manifest(**json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"checkpoint {folder} has no readable manifest: {error}") from error
        if manifest.schema != SCHEMA:
            raise CheckpointError(f"checkpoint {folder} has schema {manifest.schema}, this version reads {SCHEMA}")
        for file, facts in manifest.files.items():
            size = (folder / file).stat().st_size if (folder / file).exists() else None
            if size != facts["bytes"]:
                raise CheckpointError(
                    f"checkpoint {folder}: {file} has {size} bytes, the manifest says {facts['bytes']}"
                )
        return manifest

    def reader(self, manifest: Manifest) -> ShardReader:
        """Reads the tensors of a checkpoint."""
        return ShardReader(self.folder / _name(manifest.step), manifest.shapes, manifest.world_size)

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return sorted(int(path.parent.name[5:]) for path in self.folder.glob("step-*[0-9]/manifest.json"))

    def _commit(
        self, temporary: Path, step: int, shapes: dict[str, list[int]], state: dict[str, Any], config_hash: str
    ) -> None:
        files = {path.name: _facts(path) for path in sorted(temporary.glob("*.safetensors"))}
        manifest = Manifest(SCHEMA, step, self.ranks.world_size, config_hash, __version__, state, shapes, files)
        write_text_atomically(temporary / "manifest.json", json.dumps(asdict(manifest), indent=1))
        target = self.folder / _name(step)
        if target.exists():  # of a save that died before the pointer moved, or of a future that was gone back from
            shutil.rmtree(target)
        os.replace(temporary, target)
        write_text_atomically(self.folder / "latest", _name(step) + "\n")

    def _is_latest(self, step: int) -> bool:
        pointer = self.folder / "latest"
        return step in self.steps() and pointer.exists() and pointer.read_text(encoding="utf-8").strip() == _name(step)

    def _prune(self, newest: int, keep: int) -> None:
        """Later steps than the one just saved do not count: they belong to a future that was gone back from."""
        for step in [step for step in self.steps() if step <= newest][:-keep]:
            shutil.rmtree(self.folder / _name(step))

    def _clear_debris(self) -> None:
        for path in self.folder.glob("step-*.tmp"):
            shutil.rmtree(path)
        for path in self.folder.glob(".latest.*"):
            path.unlink()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _attempt(path: Path, pieces: dict[str, Tensor]) -> Exception | None:
    try:
        write_shard(path, pieces)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    except Exception as error:  # noqa: BLE001 - handed to the vote: no rank may leave before the others know
        return error
    return None


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
