"""Checkpoints: inspected, written without training, and damaged."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.shards import shard_name
from regen_dist.config import AnyRunConfig, EmbedderConfig, config_hash, save_config
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.distributed.ranks import Ranks, chunk, process_group, read_environment
from regen_dist.errors import RegenError
from regen_dist.models.embedder import build_model
from tests.helpers.tiny import tiny_run, wake

KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")


def folder_of(run: Path) -> CheckpointFolder:
    """The checkpoints in a run folder."""
    return CheckpointFolder(run / "checkpoints")


def newest(run: Path) -> CheckpointManifest:
    """The checkpoint that a run would go on from; fails when there is none."""
    manifest = newest_good(folder_of(run), checksums=True)
    assert manifest is not None, f"{run} has no checkpoint"
    return manifest


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Everything in a checkpoint, gathered: `<kind>/<parameter>` to its whole tensor."""
    folder = folder_of(run)
    manifest = folder.manifest(step)
    reader = folder.reader(manifest)
    return {f"{kind}/{name}": reader.whole(f"{kind}/{name}") for kind in KINDS for name in manifest.shapes}


def write_checkpoint(
    run: Path,
    step: int,
    pieces: Mapping[str, Tensor],
    shapes: dict[str, list[int]],
    *,
    state: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    rollbacks: Sequence[int] = (),
) -> CheckpointManifest:
    """Commit a checkpoint of one rank, without a training run. Returns its manifest."""
    folder = folder_of(run)
    folder.begin(step)
    facts = folder.write_shard(step, shard_name(0, 1), pieces)
    manifest = CheckpointManifest(
        step=step, samples=4 * step, config_hash="hash", version="0.0.0",
        topology={"world_size": 1, "engine": "plain", "precision": "fp32"}, state=state or {}, metrics=metrics or {},
        rollbacks=list(rollbacks), shapes=shapes,
    ).with_files({shard_name(0, 1): facts})  # fmt: skip
    folder.commit(manifest)
    return manifest


# A run folder with checkpoints, without training: written by this process alone, as several ranks would.


def save_checkpoint(
    folder: CheckpointFolder,
    step: int,
    state: dict[str, Tensor],
    *,
    ranks: int = 1,
    digest: str = "hash",
    metrics: dict[str, float] | None = None,
) -> CheckpointManifest:
    """Commit a checkpoint: `<kind>/<parameter>` to whole tensors, cut up as `ranks` ranks hold them."""
    shapes = {key.split("/", 1)[1]: list(tensor.shape) for key, tensor in state.items()}
    manifest = CheckpointManifest(
        step=step,
        samples=4 * step,
        config_hash=digest,
        version="test",
        topology={"world_size": ranks, "engine": "test", "precision": "fp32"},
        state={"num_updates": step, "data_shift": 0, "guards": {}, "data": {"dataset fingerprint": "['f1']"}},
        metrics=metrics or {},
        rollbacks=[],
        shapes=shapes,
    )
    folder.begin(step)
    files = {}
    for rank in range(ranks):
        pieces = {}
        for key, tensor in state.items():
            low, high = chunk(prod(tensor.shape), ranks, rank)
            pieces[key] = tensor.flatten()[low:high]
        files[shard_name(rank, ranks)] = folder.write_shard(step, shard_name(rank, ranks), pieces)
    manifest = manifest.with_files(files)
    folder.commit(manifest)
    return manifest


def small_state(value: float = 1.0) -> dict[str, Tensor]:
    """The state of a model of one parameter, for tests that do not look into it."""
    return {f"{kind}/weight": torch.full((6, 2), value) for kind in KINDS}


def model_state(config: AnyRunConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights that do something, averages a little beside them, and moments."""
    torch.manual_seed(seed)
    model = build_model(config.model)
    wake(model, seed)
    masters = {name: param.detach().clone() for name, param in model.named_parameters()}
    state = {f"master/{name}": tensor for name, tensor in masters.items()}
    state |= {f"ema/{name}": tensor + 0.01 for name, tensor in masters.items()}
    return state | {f"{kind}/{name}": torch.rand_like(t) for kind in KINDS[2:] for name, t in masters.items()}


def saved_run(
    output: Path, url: Path | str = "none", *, step: int = 7, ranks: int = 2, **changes: Any
) -> EmbedderConfig:
    """A run of the tiny model with one checkpoint. Returns its config; `config.folder` is the run."""
    config = tiny_run(output, url, **changes)
    save_config(config, config.folder)
    folder = CheckpointFolder(config.checkpoints)
    save_checkpoint(
        folder, step, model_state(config), ranks=ranks, digest=config_hash(config), metrics={"psnr_db": 21.5}
    )
    return config


# Checkpoints that something happened to, and what the ranks of a job make of them.


class Damage(NamedTuple):
    """Damage to one file. `name` is its name in the checkpoint folder; `at` is where it is cut, or which of its
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
    """Result of one rank: the step to go on from (None: there is no checkpoint), what it said, and the error."""

    step: int | None
    said: list[str]
    error: str
    exit_code: int
    seconds: float


def ask(url: str, cases: Sequence[Case], limits: StoreLimits) -> list[Answer]:
    """Look for the newest whole checkpoint in each case, as a rank of `run_ranks`; undo each damage afterwards."""
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
