"""What one rank does in turn: copying, writing and reading the same state in several ways. All are collective."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regen_dist.checkpoint.folder import CheckpointFolder, checkpoint_name
from regen_dist.checkpoint.manifest import Manifest
from regen_dist.checkpoint.reader import newest_good
from regen_dist.checkpoint.saver import Saver
from regen_dist.checkpoint.shards import shard_name
from regen_dist.config import RunConfig, config_hash
from regen_dist.config.version import code_version
from regen_dist.distributed.base import Engine
from regen_dist.distributed.engine import Zero3Engine
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError
from regen_dist.evaluation.checkpoint_speed.others import DeepSpeedOwn, Distributed
from regen_dist.evaluation.data_speed.turns import Case, Turn

Job = Callable[[], Mapping[str, float] | None]


class Measured:
    """The state of an engine, and what is done with it.

    Args:
        config: of the run whose state it is.
        engine: which holds it.
        ranks: of the job.
        folder: for all files; on one disk, shared by the ranks.
        url: a folder in a bucket, or None.
    """

    def __init__(self, config: RunConfig, engine: Engine, ranks: Ranks, folder: Path, url: str | None) -> None:
        self.config, self.engine, self.ranks, self.folder, self.url = config, engine, ranks, folder, url
        self.ours = CheckpointFolder(folder / "ours")
        self.dcp = Distributed(engine, ranks)
        self.deepspeed = DeepSpeedOwn(engine) if isinstance(engine, Zero3Engine) else None
        self._step = 0

    def saves(self) -> dict[str, Case]:
        """Saving, by name."""
        pieces = self.engine.pieces()
        buffers = {name: torch.empty(piece.shape, pin_memory=piece.is_cuda) for name, piece in pieces.items()}
        own = self._saver(self.ours)
        cases: dict[str, Case] = {
            "bare copy": lambda: self.timed(lambda: _copy(pieces, buffers), lambda: self._state_bytes(buffers)),
            "plain files": lambda: self._written("plain", lambda folder: _write_plain(folder, self.ranks, buffers)),
            "ours": lambda: self._save(own),
            "torch.distributed.checkpoint": lambda: self._written("dcp", self.dcp.save),
        }
        if self.deepspeed is not None:
            deepspeed = self.deepspeed
            cases["DeepSpeed"] = lambda: self._written("deepspeed/saved", deepspeed.save)
        if self.url is not None:
            bucket = CheckpointFolder(self.url)
            there = self._saver(bucket)
            cases["bucket: plain objects"] = lambda: self.timed(lambda: self._put_plain(bucket), self._files_bytes)
            cases["bucket: ours"] = lambda: self._save(there)
        return cases

    def loads(self) -> dict[str, Case]:
        """Loading what `saves` left, by name: at any number of ranks, but for DeepSpeed's."""
        cases: dict[str, Case] = {
            "plain reads": lambda: self.timed(self._read_plain, self._files_bytes),
            "ours": lambda: self.timed(lambda: self._restore(self.ours), self._files_bytes),
            "ours, from choosing to loaded, sizes compared": lambda: self.timed(
                lambda: self._choose_and_restore(checksums=False), self._files_bytes
            ),
            "ours, from choosing to loaded, checksums verified": lambda: self.timed(
                lambda: self._choose_and_restore(checksums=True), self._files_bytes
            ),
            "torch.distributed.checkpoint": lambda: self._loaded("dcp", self.dcp.load),
        }
        if self.deepspeed is not None and self.ranks.world_size == self._newest(self.ours).world_size:
            deepspeed = self.deepspeed
            cases["DeepSpeed"] = lambda: self._loaded("deepspeed/saved", deepspeed.load)
        if self.url is not None:
            bucket = CheckpointFolder(self.url)
            cases["bucket: plain gets"] = lambda: self.timed(lambda: self._get_plain(bucket), self._files_bytes)
            cases["bucket: ours"] = lambda: self.timed(lambda: self._restore(bucket), self._files_bytes)
        return cases

    def digests(self) -> dict[str, str]:
        """SHA-256 of this rank's pieces of each kind."""
        digests: dict[str, Any] = {}
        for name, piece in sorted(self.engine.pieces().items()):
            kind = name.split("/", 1)[0]
            digests.setdefault(kind, hashlib.sha256()).update(piece.detach().cpu().contiguous().numpy().tobytes())
        return {kind: digest.hexdigest() for kind, digest in digests.items()}

    def deepspeed_elsewhere(self) -> str:
        """What DeepSpeed says to its own checkpoint at a number of ranks that did not save it; empty without it."""
        if self.deepspeed is None:
            return ""
        try:
            self.deepspeed.load(self.folder / "deepspeed/saved")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the figure
            return f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return "loaded"

    def timed(self, job: Job, size_bytes: Callable[[], int]) -> Turn:
        """How long the slowest rank takes; `size_bytes` says of how much, over all ranks, when it is done."""
        self.ranks.barrier()
        begun = time.perf_counter()
        facts = job() or {}
        self.ranks.barrier()
        return Turn(size_bytes(), time.perf_counter() - begun, facts)

    # -- saving

    def _state_bytes(self, buffers: Mapping[str, Tensor]) -> int:
        own = sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())
        return int(self.ranks.sum([float(own)])[0])

    def _saver(self, folder: CheckpointFolder) -> Saver:
        return Saver(folder, self.ranks, self.config.checkpoint)

    def _save(self, saver: Saver) -> Turn:
        self._step += 1
        manifest, pieces = self._manifest(self._step), self.engine.pieces()

        def job() -> None:
            saver.save(manifest, pieces)
            outcome = saver.settle()
            assert outcome is not None, "settle waits"
            if outcome.problem:
                raise CheckpointError(outcome.problem)

        return self.timed(job, lambda: saver.folder.manifest(manifest.step).size_bytes)

    def _written(self, name: str, write: Callable[[Path], Mapping[str, float] | None]) -> Turn:
        """A way of writing into an empty folder; and how long it takes to sync to disk what it did not."""
        folder = self.folder / name
        if self.ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
        turn = self.timed(lambda: write(folder), lambda: _bytes_in(folder))
        begun = time.perf_counter()
        if self.ranks.is_main:
            _sync(folder)
        return Turn(turn.amount, turn.seconds, {**turn.facts, "sync_s": time.perf_counter() - begun})

    def _manifest(self, step: int) -> Manifest:
        engine = self.config.engine
        topology = {"world_size": self.ranks.world_size, "engine": engine.kind, "precision": engine.precision}
        return Manifest(step, 0, config_hash(self.config), code_version(), topology, {}, {}, [], self.engine.shapes())

    def _put_plain(self, bucket: CheckpointFolder) -> None:
        file = shard_name(self.ranks.rank, self.ranks.world_size)
        bucket.store.put_file(
            f"plain/{file}", self.folder / "ours" / checkpoint_name(self._newest(self.ours).step) / file
        )

    # -- loading

    def _newest(self, folder: CheckpointFolder) -> Manifest:
        return folder.manifest(folder.steps()[-1])

    def _files(self) -> list[str]:
        """The files that this rank reads when all are read once."""
        manifest = self._newest(self.ours)
        names = [f"{checkpoint_name(manifest.step)}/{file}" for file in sorted(manifest.files)]
        return names[self.ranks.rank :: self.ranks.world_size]

    def _files_bytes(self) -> int:
        return self._newest(self.ours).size_bytes

    def _read_plain(self) -> None:
        for name in self._files():
            (self.folder / "ours" / name).read_bytes()

    def _get_plain(self, bucket: CheckpointFolder) -> None:
        for name in self._files():
            bucket.store.get(f"plain/{Path(name).name}")

    def _restore(self, folder: CheckpointFolder) -> None:
        self.engine.restore(folder.reader(self._newest(folder)), self.engine.num_updates)

    def _choose_and_restore(self, *, checksums: bool) -> None:
        manifest = newest_good(self.ours, self.ranks, checksums=checksums)
        assert manifest is not None, "one was saved"
        self.engine.restore(self.ours.reader(manifest), self.engine.num_updates)

    def _loaded(self, name: str, load: Callable[[Path], None]) -> Turn:
        return self.timed(lambda: load(self.folder / name), lambda: _bytes_in(self.folder / name))


@torch.no_grad()
def _copy(pieces: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    for name, piece in pieces.items():
        buffers[name].copy_(piece, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _write_plain(folder: Path, ranks: Ranks, buffers: Mapping[str, Tensor]) -> None:
    """The same bytes into a file a rank, synced, and nothing else."""
    folder.mkdir(exist_ok=True)
    with (folder / f"rank-{ranks.rank}").open("wb") as file:
        for buffer in buffers.values():
            file.write(memoryview(buffer.numpy()))  # type: ignore[arg-type]  # an array is a buffer
        file.flush()
        os.fsync(file.fileno())


def _all_files(folder: Path) -> Sequence[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in _all_files(folder))


def _sync(folder: Path) -> None:
    for path in _all_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
