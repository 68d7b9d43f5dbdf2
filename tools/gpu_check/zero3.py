"""ZeRO-3 with one rank against the plain engine: equal losses and weights, no discarded traces when images and clips
alternate, and a state that is saved and restored."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config import EmbedderConfig, load_embedder_config
from regen_dist.config.t2v import T2VConfig
from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.diffusion.path import noisy, target_of
from regen_dist.distributed.engine import Engine, Pieces
from regen_dist.distributed.ranks import Ranks, process_group, read_environment
from regen_dist.distributed.zero3 import build_engine
from regen_dist.errors import RegenError
from regen_dist.models.embedder import build_model
from regen_dist.training.run import build_task
from tools.gpu_check.machine import Machine, relative_error, require_close

_TURNS = (8, 1, 8, 1, 1, 8)  # latent frames of the row of each step: clips and images in turn
_LR = 1e-3
SMALL_EMBEDDER = (  # for the CPU
    "model.encoder={stem_patch: 4, stages: [{channels: 8, temporal: 2}, {channels: 8, spatial: 2, temporal: 2}, "
    "{channels: 8, temporal: 2}, {channels: 8, temporal: 2}, {channels: 8, temporal: 2}]}",
    "model.conditioning.width=16",
    "model.decoder.width=32",
    "model.decoder.heads=2",
)


def zero3(machine: Machine) -> dict[str, Any]:
    """Train the same rows by both engines, then an embedder on clips and images by turns."""
    ranks = read_environment({})
    with process_group(ranks, needed=True):
        rows = _rows(machine, ranks)
        thrown_away = {"t2v": rows.pop("invalidations"), "regen": _embedder(machine, ranks)}
    if any(thrown_away.values()):
        raise RegenError(f"traces of ZeRO-3's prefetch thrown away: {thrown_away}; none was expected")
    summary = f"weights within {rows['weights']:.1e} of the plain engine's update; no trace thrown away; restored"
    return {**rows, "invalidations": thrown_away, "summary": summary}


def _rows(machine: Machine, ranks: Ranks) -> dict[str, Any]:
    """Return the text-to-video transformer at full width with few blocks."""
    sharded, counts = build_engine(_config(machine, "zero3"), ranks, lambda: _model(machine)), list[int]()
    start = {name: each.detach().cpu().clone() for name, each in sharded.named_masters()}
    with counted_invalidations(counts), TemporaryDirectory() as folder:
        losses = [_step(sharded, machine, step) for step in range(3)]
        saved = _save(sharded, Path(folder) / "state.safetensors")
        losses += [_step(sharded, machine, step) for step in range(3, len(_TURNS))]
        ends = {name: each.detach().cpu().clone() for name, each in sharded.named_masters()}
        sharded.restore(saved, 3)
        again = [_step(sharded, machine, step) for step in range(3, len(_TURNS))]
    require_close("losses after restoring", relative_error(torch.tensor(again), torch.tensor(losses[3:])), 1e-3)
    del sharded
    gc.collect()
    machine.forget_peak()
    plain = build_engine(_config(machine, "plain"), ranks, lambda: _model(machine))
    plain.restore(_Masters(start), 0)
    expected = [_step(plain, machine, step) for step in range(len(_TURNS))]
    close = require_close(
        "losses", relative_error(torch.tensor(losses), torch.tensor(expected)), machine.size(1e-2, 1e-4)
    )
    moved = [(ends[name] - start[name], each.cpu() - start[name]) for name, each in plain.named_masters()]
    found, wanted = (torch.cat(each) for each in zip(*moved, strict=True))
    if not wanted.any():
        raise RegenError("six updates of the plain engine changed nothing: there is nothing to compare")
    # AdamW makes steps of one size of gradients of any size: where one is small, its rounding in bf16 is seen whole.
    weights = require_close("what six updates changed", relative_error(found, wanted), machine.size(0.3, 1e-2))
    return {"losses": losses, "loss_error": close, "weights": weights, "invalidations": len(counts)}


def _config(machine: Machine, kind: str) -> T2VConfig:
    return row_config(machine, kind, 4, persistence_threshold=machine.size(100_000, 0))


def row_config(machine: Machine, kind: str, blocks: int, **engine: Any) -> T2VConfig:
    """Return a text-to-video model as wide as that of 5B with so many blocks, without data, one row a step."""
    sizes = machine.size({"heads": 24, "width": 3072, "text_width": 4096}, {"heads": 4, "width": 64, "text_width": 32})
    own = {"kind": kind, "precision": machine.precision, "partitioned_init": kind == "zero3"}
    return T2VConfig.model_validate({
        "name": "gpu_check",
        "model": {**sizes, "blocks": machine.size(blocks, 2)},
        "data": {"url": "none"},
        "engine": {**own, **engine},
        "train": {"steps": len(_TURNS), "batch_global": 1},
    })  # fmt: skip


def _model(machine: Machine) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(_config(machine, "plain").model)


def _step(engine: Engine, machine: Machine, step: int) -> float:
    """One step on a row that belongs to its number."""
    size = machine.size((24, 40), (4, 6))
    generator = torch.Generator().manual_seed(step)
    shape = (1, 8, _TURNS[step], *size)
    x0, noise = (torch.randn(shape, generator=generator).to(machine.device) for _ in range(2))
    text = torch.randn(1, 64, engine.config.model.text_width, generator=generator).to(machine.device)  # type: ignore[attr-defined]
    mask, t = torch.ones(1, 64, dtype=torch.bool, device=machine.device), torch.full((1,), 0.6, device=machine.device)
    velocity = engine(noisy("rectified_flow", x0, noise, t), t, text, mask)
    loss = F.mse_loss(velocity, target_of("rectified_flow", "velocity", x0, noise, t))
    engine.backward(loss, is_last=True)
    if not engine.step(_LR).applied:
        raise RegenError(f"step {step}: a gradient was not finite")
    return float(loss.detach())


class _SavedState:
    """Pieces stored in a safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read_all(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the pieces, as `PieceSource`."""
        from safetensors import safe_open

        with safe_open(self._path, "pt") as file:
            for name, (low, high) in wanted.items():
                yield name, file.get_slice(name)[low:high]


def _save(engine: Engine, path: Path) -> _SavedState:
    from regen_dist.checkpoint.shards import write_shard

    with path.open("wb") as file:
        write_shard(file, {name: piece.detach().cpu() for name, piece in engine.pieces().items()})
    return _SavedState(path)


class _Masters:
    """State before the first step: given weights and zero moments."""

    def __init__(self, masters: Pieces) -> None:
        self._masters = masters

    def read_all(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the pieces, as `PieceSource`."""
        for name in wanted:
            kind, parameter = name.split("/", 1)
            whole = self._masters[parameter]
            yield name, whole if kind in ("master", "ema") else torch.zeros_like(whole)


def _embedder(machine: Machine, ranks: Ranks) -> int:
    """Return the number of traces discarded in the training of an embedder."""
    config = _embedder_config(machine)
    task, counts = build_task(config, machine.device), list[int]()
    engine = build_engine(config, ranks, task.build)
    size = machine.size((96, 160), (16, 16))
    with counted_invalidations(counts):
        for step, frames in enumerate((33, 1, 33, 1, 1, 33)):
            video = torch.randint(0, 256, (1, 3, frames, *size), dtype=torch.uint8)
            loss = task.loss(engine, ClipBatch(video, torch.tensor([step])), step).value
            engine.backward(loss, is_last=True)
            engine.step(_LR)
    return len(counts)


def _embedder_config(machine: Machine) -> EmbedderConfig:
    changes = ["model.decoder.blocks=2", *machine.size((), (*SMALL_EMBEDDER, "engine.persistence_threshold=0"))]
    return embedder_config(machine, "regen_k32", "zero3", changes)


def embedder_config(machine: Machine, name: str, kind: str, changes: Sequence[str]) -> EmbedderConfig:
    """Return a preset without data, one clip a step."""
    own = [f"engine.kind={kind}", f"engine.precision={machine.precision}", "data.url=absent"]
    own += ["data.validation_url=absent", "train.batch_global=1", "train.accumulation=1"]
    return load_embedder_config(Path(f"configs/embedder/{name}.yaml"), [*own, *changes])


@contextmanager
def counted_invalidations(counts: list[int]) -> Iterator[None]:
    """Add to `counts` each time that DeepSpeed forgets in which order a step calls its modules, and so gathers no
    weights ahead until it has learned another."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    invalidate = Coordinator._invalidate_trace

    def counted(self: Any) -> None:
        counts.append(1)
        invalidate(self)

    with mock.patch.object(Coordinator, "_invalidate_trace", counted):
        yield
