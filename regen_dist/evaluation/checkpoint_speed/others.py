"""What a user could take instead: torch.distributed.checkpoint over the same pieces, and DeepSpeed's own saving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from regen_dist.distributed.base import Engine
from regen_dist.distributed.engine import Zero3Engine
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError


class Distributed:
    """torch.distributed.checkpoint over this rank's pieces: each is an even flat chunk, so a sharded DTensor.

    Args:
        engine: whose pieces.
        ranks: of the job; its process group must be there.
    """

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self._engine = engine
        self._mesh: DeviceMesh = init_device_mesh("cpu", (ranks.world_size,))
        self._group = dist.new_group(backend="gloo")

    def save(self, folder: Path) -> None:
        """Save, and wait until every rank is done."""
        save(self._state(), checkpoint_id=str(folder), process_group=self._group)

    def load(self, folder: Path) -> None:
        """Load into the engine, at any number of ranks."""
        state = self._state(empty=True)
        load(state, checkpoint_id=str(folder), process_group=self._group)
        self._engine.restore(_Held({key: tensor.to_local() for key, tensor in state.items()}), self._engine.num_updates)

    def _state(self, *, empty: bool = False) -> dict[str, DTensor]:
        return {
            key: self._sharded(key, torch.empty_like(piece, device="cpu") if empty else piece.detach().cpu())
            for key, piece in self._engine.pieces().items()
        }

    def _sharded(self, key: str, piece: Tensor) -> DTensor:
        size = prod(self._engine.shapes()[key.split("/", 1)[1]])
        return DTensor.from_local(piece, self._mesh, [Shard(0)], shape=torch.Size([size]), stride=(1,), run_check=False)


class _Held:
    """Pieces that were loaded already, as an engine takes them."""

    def __init__(self, pieces: Mapping[str, Tensor]) -> None:
        self._pieces = pieces

    def read_all(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds, whatever range is named: it is the same."""
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
