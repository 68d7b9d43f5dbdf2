"""The sharded state of a run on disk, readable at any number of ranks.

Every rank writes the pieces that it holds into one safetensors file. A piece is an even chunk of a flat parameter
(`ranks.chunk`), so where any element lies follows from the parameter's size and the number of ranks that saved: reading
at another number of ranks is reading other slices, without a conversion and without communication. Nothing is
unpickled.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regen_dist.distributed.ranks import chunk
from regen_dist.errors import CheckpointError


def shard_name(rank: int, world_size: int) -> str:
    """File name of one rank's pieces."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_shard(path: Path, pieces: dict[str, Tensor]) -> None:
    """Write a rank's pieces. The caller commits: until then the file is debris."""
    save_file({name: piece.detach().cpu().contiguous() for name, piece in pieces.items()}, path)


class ShardReader:
    """Reads parts of flat parameters out of the shards of a checkpoint.

    Args:
        folder: of the committed checkpoint.
        shapes: the full shape of every parameter.
        world_size: the number of ranks that saved it.
    """

    def __init__(self, folder: Path, shapes: dict[str, list[int]], world_size: int) -> None:
        self._folder, self._shapes, self._world_size = folder, shapes, world_size
        self._files: dict[int, Any] = {}

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Elements low..high of the flat parameter behind `key` ("<kind>/<parameter>").

        Raises:
            CheckpointError: the parameter is not in the checkpoint.
        """
        size = self._size(key)
        parts = []
        for rank in range(self._world_size):
            start, stop = chunk(size, self._world_size, rank)
            first, last = max(low, start), min(high, stop)
            if first < last:
                parts.append(self._file(rank).get_slice(key)[first - start : last - start])
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, key: str) -> Tensor:
        """The whole parameter in its own shape."""
        return self.read(key, 0, self._size(key)).view(self._shapes[key.split("/", 1)[1]])

    def _size(self, key: str) -> int:
        name = key.split("/", 1)[1]
        if name not in self._shapes:
            raise CheckpointError(f"{self._folder} holds no parameter '{name}': it was saved by another model config")
        return prod(self._shapes[name])

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            path = self._folder / shard_name(rank, self._world_size)
            try:
                self._files[rank] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {path}: {error}") from error
        return self._files[rank]
