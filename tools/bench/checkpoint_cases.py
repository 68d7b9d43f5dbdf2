"""Cases of `regen bench checkpoint`: saving during training, saving and loading alone, and the alternatives."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regen_dist.checkpoint.folder import CheckpointFolder, checkpoint_name, newest_good
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.saver import Saver
from regen_dist.checkpoint.shards import shard_name
from regen_dist.config import EmbedderConfig, config_hash, embedder_only, load_saved_config
from regen_dist.config.version import code_version
from regen_dist.distributed.engine import Engine
from regen_dist.distributed.ranks import Ranks, process_group, read_environment
from regen_dist.distributed.rendezvous import ending_at_once
from regen_dist.distributed.zero3 import Zero3Engine, build_engine
from regen_dist.errors import CheckpointError, DataError
from regen_dist.jsontext import json_text
from regen_dist.models.embedder import build_model
from tools.bench.common import Case, Rounds, Turn, in_turn

# Cost of a save to its run, from the run's record, which must have a line for every step.
#
# A save happens between two steps, s and s + 1. The record has the time of each line and the duration of each step
# without what happened in between, so the clock shows how long training was blocked. A thread then writes during later
# steps, which are compared with undisturbed ones.

COLD_STEPS = 2  # of a start: caches and pools fill
_CLOCKS_AGREE_S = 1e-3  # the record's clock and the one that measures


class Save(NamedTuple):
    """One save of a run; times in seconds.

    Args:
        step: step after which it was made.
        blocked_s: blocking time as measured by the saver: the copy and, if waited for, the writing.
        still_s: time between the two steps by the clock.
        seconds: time between the beginning of the copy and the commit of the checkpoint.
        size_bytes: size of all shards.
        beside: steps made, wholly or partly, during the writing.
        beside_s: total duration of these steps.
    """

    step: int
    blocked_s: float
    still_s: float
    seconds: float
    size_bytes: int
    beside: int
    beside_s: float


@dataclass(frozen=True)
class Saving:
    """Saves of a run that can be evaluated, and its undisturbed steps.

    The first save, which allocates the buffers, and the last, which is waited for, are excluded.
    """

    quiet_s: list[float]
    saves: list[Save]
    first_blocked_s: float

    @property
    def step_s(self) -> float:
        """An undisturbed step: the median."""
        return median(self.quiet_s)

    def lost_s(self, save: Save) -> float:
        """Return the total slowdown of the steps during a save's writing, relative to undisturbed steps."""
        return save.beside_s - save.beside * self.step_s

    def cost_s(self, save: Save) -> float:
        """Return the time by which a save prolongs the run."""
        return save.still_s + self.lost_s(save)


def saving(lines: Sequence[Mapping[str, Any]]) -> Saving:
    """Return the saves in the record of a run that was written from its start with `train.log_every=1`.

    Raises:
        DataError: a save failed, or the run was too short to evaluate one.
    """
    steps = {line["step"]: line for line in lines if line["kind"] == "train"}
    saved = [line for line in lines if line["kind"] == "checkpoint"]
    if failed := [line["problem"] for line in saved if line["problem"]]:
        raise DataError(f"a checkpoint of the run was not saved: {failed[0]}")
    judged = [line for line in saved[1:] if line["step"] + 1 in steps]
    concurrent = {line["step"]: _concurrent_steps(steps, line) for line in saved}
    disturbed = {step for each in concurrent.values() for step in each}
    quiet = [line["step_s"] for step, line in steps.items() if step > COLD_STEPS and step not in disturbed]
    if not judged or not quiet:
        raise DataError(
            f"a run of {len(steps)} steps with {len(saved)} saves cannot be judged: the first save and the last are "
            "left out, and some steps must be undisturbed. Raise train.steps, or change checkpoint.every"
        )
    saves = [_save(steps, line, concurrent[line["step"]]) for line in judged]
    return Saving(quiet, saves, saved[0]["blocked_s"])


def _save(steps: Mapping[int, Mapping[str, Any]], line: Mapping[str, Any], beside: Sequence[int]) -> Save:
    before, after = steps[line["step"]], steps[line["step"] + 1]
    return Save(
        step=line["step"],
        blocked_s=line["blocked_s"],
        still_s=after["time"] - before["time"] - after["step_s"],
        seconds=line["seconds"],
        size_bytes=line["bytes"],
        beside=len(beside),
        beside_s=sum(steps[step]["step_s"] for step in beside),
    )


def _concurrent_steps(steps: Mapping[int, Mapping[str, Any]], line: Mapping[str, Any]) -> list[int]:
    """Return the steps that began after the save and before its commit."""
    committed = steps[line["step"]]["time"] + line["seconds"] - _CLOCKS_AGREE_S
    later = (step for step in steps if step > line["step"])
    return [step for step in later if steps[step]["time"] - steps[step]["step_s"] < committed]


# Alternatives: torch.distributed.checkpoint on the same shards, and DeepSpeed's own saving.


class Distributed:
    """torch.distributed.checkpoint on this rank's shards: each is an even flat chunk, hence a sharded DTensor.

    Args:
        engine: engine that holds the state.
        ranks: ranks of the job; its process group must exist.
    """

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load
        from torch.distributed.checkpoint.state_dict_saver import save
        from torch.distributed.device_mesh import init_device_mesh

        self._engine, self._load, self._save = engine, load, save
        self._mesh = init_device_mesh("cpu", (ranks.world_size,))
        self._group = dist.new_group(backend="gloo")

    def save(self, folder: Path) -> None:
        """Save, and wait until every rank is done."""
        self._save(self._state(), checkpoint_id=str(folder), process_group=self._group)

    def load(self, folder: Path) -> None:
        """Load into the engine, at any number of ranks."""
        state = self._state(empty=True)
        self._load(state, checkpoint_id=str(folder), process_group=self._group)
        self._engine.restore(
            _LoadedPieces({key: tensor.to_local() for key, tensor in state.items()}), self._engine.num_updates
        )

    def _state(self, *, empty: bool = False) -> dict[str, Any]:
        return {
            key: self._sharded(key, torch.empty_like(piece, device="cpu") if empty else piece.detach().cpu())
            for key, piece in self._engine.pieces().items()
        }

    def _sharded(self, key: str, piece: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Shard

        size = prod(self._engine.shapes()[key.split("/", 1)[1]])
        return DTensor.from_local(piece, self._mesh, [Shard(0)], shape=torch.Size([size]), stride=(1,), run_check=False)


class _LoadedPieces:
    """Already loaded pieces, in the form that an engine reads."""

    def __init__(self, pieces: Mapping[str, Tensor]) -> None:
        self._pieces = pieces

    def read_all(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
        """Return this rank's pieces for any requested range: they are the same."""
        return ((key, self._pieces[key]) for key in wanted)


class DeepSpeedOwn:
    """DeepSpeed's `save_checkpoint` and `load_checkpoint`."""

    def __init__(self, engine: Zero3Engine) -> None:
        self._engine = engine.deepspeed

    def save(self, folder: Path) -> None:
        """Save, and wait until every rank is done."""
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name)

    def load(self, folder: Path) -> None:
        """Load at the number of ranks that saved.

        Raises:
            CheckpointError: DeepSpeed found nothing to load.
        """
        found, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if found is None:
            raise CheckpointError(f"DeepSpeed loaded nothing from {folder}")


# Cases of one rank: copying, writing and reading the same state in several ways. All are collective.

Job = Callable[[], Mapping[str, float] | None]


class MeasuredEngine:
    """State of an engine and the operations measured on it.

    Args:
        config: config of the run.
        engine: engine that holds the state.
        ranks: ranks of the job.
        folder: folder of all files, on one disk shared by the ranks.
        url: folder in a bucket, or None.
    """

    def __init__(self, config: EmbedderConfig, engine: Engine, ranks: Ranks, folder: Path, url: str | None) -> None:
        self.config, self.engine, self.ranks, self.folder, self.url = config, engine, ranks, folder, url
        self.ours = CheckpointFolder(folder / "ours")
        self.dcp = Distributed(engine, ranks)
        self.deepspeed = DeepSpeedOwn(engine) if isinstance(engine, Zero3Engine) else None
        self._step = 0

    def saves(self) -> dict[str, Case]:
        """Return the cases of saving, by name."""
        pieces = self.engine.pieces()
        buffers = {name: torch.empty(piece.shape, pin_memory=piece.is_cuda) for name, piece in pieces.items()}
        own = Saver(self.ours, self.ranks, self.config.checkpoint)
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
            there = Saver(bucket, self.ranks, self.config.checkpoint)
            cases["bucket: plain objects"] = lambda: self.timed(lambda: self._put_plain(bucket), self._files_bytes)
            cases["bucket: ours"] = lambda: self._save(there)
        return cases

    def loads(self) -> dict[str, Case]:
        """Return the cases of loading what `saves` wrote, by name: with any number of ranks, except DeepSpeed's."""
        whole = "ours, from choosing to loaded, "
        jobs: dict[str, Job] = {
            "plain reads": self._read_plain,
            "ours": lambda: self._restore(self.ours),
            f"{whole}sizes compared": lambda: self._choose_and_restore(checksums=False),
            f"{whole}checksums verified": lambda: self._choose_and_restore(checksums=True),
        }
        cases: dict[str, Case] = {name: partial(self.timed, job, self._files_bytes) for name, job in jobs.items()}
        cases["torch.distributed.checkpoint"] = lambda: self._loaded("dcp", self.dcp.load)
        if self.deepspeed is not None and self.ranks.world_size == self._newest(self.ours).world_size:
            deepspeed = self.deepspeed
            cases["DeepSpeed"] = lambda: self._loaded("deepspeed/saved", deepspeed.load)
        if self.url is not None:
            bucket = CheckpointFolder(self.url)
            cases["bucket: plain gets"] = partial(self.timed, lambda: self._get_plain(bucket), self._files_bytes)
            cases["bucket: ours"] = partial(self.timed, lambda: self._restore(bucket), self._files_bytes)
        return cases

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of this rank's pieces of each kind."""
        digests: dict[str, Any] = {}
        for name, piece in sorted(self.engine.pieces().items()):
            kind = name.split("/", 1)[0]
            digests.setdefault(kind, hashlib.sha256()).update(piece.detach().cpu().contiguous().numpy().tobytes())
        return {kind: digest.hexdigest() for kind, digest in digests.items()}

    def deepspeed_elsewhere(self) -> str:
        """Return DeepSpeed's error on loading its own checkpoint with another number of ranks; empty without error."""
        if self.deepspeed is None:
            return ""
        try:
            self.deepspeed.load(self.folder / "deepspeed/saved")
        except Exception as error:  # noqa: BLE001 - the error is the result
            return f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return "loaded"

    def timed(self, job: Job, size_bytes: Callable[[], int]) -> Turn:
        """Time the slowest rank; `size_bytes` returns the amount over all ranks when it is done."""
        self.ranks.barrier()
        begun = time.perf_counter()
        facts = job() or {}
        self.ranks.barrier()
        return Turn(size_bytes(), time.perf_counter() - begun, facts)

    # -- saving

    def _state_bytes(self, buffers: Mapping[str, Tensor]) -> int:
        own = sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())
        return int(self.ranks.sum([float(own)])[0])

    def _save(self, saver: Saver) -> Turn:
        self._step += 1
        engine, pieces, version = self.config.engine, self.engine.pieces(), code_version()
        topology = {"world_size": self.ranks.world_size, "engine": engine.kind, "precision": engine.precision}
        shapes, digest = self.engine.shapes(), config_hash(self.config)
        manifest = CheckpointManifest(self._step, 0, digest, version, topology, {}, {}, [], shapes)

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
        for path in folder.rglob("*") if self.ranks.is_main else ():
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        return Turn(turn.amount, turn.seconds, {**turn.facts, "sync_s": time.perf_counter() - begun})

    def _put_plain(self, bucket: CheckpointFolder) -> None:
        file = shard_name(self.ranks.rank, self.ranks.world_size)
        own = self.folder / "ours" / checkpoint_name(self._newest(self.ours).step)
        bucket.store.put_file(f"plain/{file}", own / file)

    # -- loading

    def _newest(self, folder: CheckpointFolder) -> CheckpointManifest:
        return folder.manifest(folder.steps()[-1])

    def _files(self) -> list[str]:
        """Return the files that this rank reads when every file is read once."""
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
    """Write the same bytes to one file per rank and fsync it; nothing else."""
    folder.mkdir(exist_ok=True)
    with (folder / f"rank-{ranks.rank}").open("wb") as file:
        for buffer in buffers.values():
            file.write(memoryview(buffer.numpy()))  # type: ignore[arg-type]  # an array is a buffer
        file.flush()
        os.fsync(file.fileno())


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# One rank of `regen bench checkpoint`: `python -m tools.bench.checkpoint_cases --help`.
#
# At the number of ranks that the bench is about it saves and loads; at any other, in the same folder, it loads what
# was saved. Rank 0 leaves what it measured in `ranks-N.json`.

_READS = ("plain reads", "plain gets")  # they load nothing into the engine


def result_file(folder: Path, ranks: int) -> Path:
    """Return the path of rank 0's figures for this number of ranks."""
    return folder / f"ranks-{ranks}.json"


def log_file(folder: Path, ranks: int) -> Path:
    """Return the path of rank 0's log."""
    return folder / f"ranks-{ranks}.log"


def main() -> None:
    """Measure as the rank that the environment describes."""
    parser = argparse.ArgumentParser(description="One rank of `regen bench checkpoint`.")
    parser.add_argument("folder", type=Path, help="with the run's saved config; for the checkpoints and the figures")
    parser.add_argument("--url", help="a folder in a bucket, to be measured too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", action="store_true", help="load alone, what other ranks saved here")
    given = parser.parse_args()
    ranks = read_environment()
    if ranks.is_main:
        _print_to(log_file(given.folder, ranks.world_size))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with ending_at_once(), process_group(ranks, needed=True):
        config = embedder_only(load_saved_config(given.folder), str(given.folder))
        found = measure(config, ranks, given.folder, given.url, given.repeats, given.load)
        if ranks.is_main:
            result_file(given.folder, ranks.world_size).write_text(json_text(found) + "\n", encoding="utf-8")


def measure(
    config: EmbedderConfig, ranks: Ranks, folder: Path, url: str | None, repeats: int, load_only: bool
) -> dict[str, Any]:
    """Time the `saves` and `loads` of a `MeasuredEngine` in turn, and check that all loads restored the same state."""

    def build() -> nn.Module:
        torch.manual_seed(config.train.seed)
        return build_model(config.model)

    engine = build_engine(config, ranks, build)
    measured = MeasuredEngine(config, engine, ranks, folder, url)
    found: dict[str, Any] = {"ranks": ranks.world_size, "parameters": sum(map(prod, engine.shapes().values()))}
    expected: dict[str, str] = {}
    if not load_only:
        _fill(measured, seed=ranks.rank)
        expected, saves = measured.digests(), measured.saves()
        in_turn(saves, 1)  # a first round, in which buffers are made, does not count
        found["save"] = _plain(in_turn(saves, repeats))
    cases = measured.loads()
    digests = {name: _digests_after(measured, case) for name, case in cases.items() if not name.endswith(_READS)}
    digests.get("DeepSpeed", {}).pop("ema", None)  # it does not know of it
    expected = expected or digests["torch.distributed.checkpoint"]  # written and read by code that is not ours
    differs = any(expected[kind] != digest for each in digests.values() for kind, digest in each.items())
    found["restored_alike"] = not ranks.agree(differs)
    found["load"] = _plain(in_turn(cases, repeats))
    if "DeepSpeed" not in cases:
        found["deepspeed_says"] = measured.deepspeed_elsewhere()
    return found


def _digests_after(measured: MeasuredEngine, case: Case) -> dict[str, str]:
    """Return the digests after loading into an engine whose state was overwritten. This turn is not timed."""
    for piece in measured.engine.pieces().values():
        piece.detach().zero_()
    case()
    return measured.digests()


@torch.no_grad()
def _fill(measured: MeasuredEngine, seed: int) -> None:
    """Fill the state with random numbers, so that loaded state differs from never-saved state."""
    generator = torch.Generator().manual_seed(seed)
    for piece in measured.engine.pieces().values():
        piece.detach().copy_(torch.rand(piece.shape, generator=generator))


def _plain(rounds: Rounds) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(turn) for turn in turns] for name, turns in rounds.items()}


def _print_to(log: Path) -> None:
    """Redirect all output of this process and its libraries to a log: the terminal belongs to the command."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


if __name__ == "__main__":
    main()
