"""What several ranks wrote can be read at any number of ranks."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regen_dist.checkpoint.shards import ShardReader, shard_name, write_shard
from regen_dist.distributed.ranks import chunk
from regen_dist.errors import CheckpointError

SHAPES = {"matrix": [5, 7], "vector": [4], "one": [1], "pair": [2], "kernel": [3, 2, 1, 3, 3]}
KINDS = ("master", "ema")


def _whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind}/{name}": torch.randn(shape, generator=generator) for kind in KINDS for name, shape in SHAPES.items()
    }


def _write(folder: Path, world_size: int) -> ShardReader:
    for rank in range(world_size):
        pieces = {}
        for key, tensor in _whole().items():
            low, high = chunk(tensor.numel(), world_size, rank)
            pieces[key] = tensor.flatten()[low:high]
        write_shard(folder / shard_name(rank, world_size), pieces)
    return ShardReader(folder, SHAPES, world_size)


@pytest.mark.parametrize("saved_by", [1, 3, 4])
def test_whole_tensors_come_back(tmp_path: Path, saved_by: int) -> None:
    """Also those that have fewer elements than there are ranks, of which some ranks hold nothing."""
    reader = _write(tmp_path, saved_by)
    for key, tensor in _whole().items():
        assert torch.equal(reader.whole(key), tensor), key


@pytest.mark.parametrize("read_by", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_its_chunks(tmp_path: Path, read_by: int) -> None:
    """Saved by three ranks: each rank of another number gets exactly its chunk of every parameter."""
    reader = _write(tmp_path, 3)
    for key, tensor in _whole().items():
        size = prod(SHAPES[key.split("/")[1]])
        for rank in range(read_by):
            low, high = chunk(size, read_by, rank)
            assert torch.equal(reader.read(key, low, high), tensor.flatten()[low:high])


def test_an_unknown_parameter_is_named(tmp_path: Path) -> None:
    """Another model's parameter is an error with its name, not a KeyError."""
    with pytest.raises(CheckpointError, match="no parameter 'other': it was saved by another model"):
        _write(tmp_path, 2).whole("master/other")


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_a_bad_file_is_named(tmp_path: Path, damage: str) -> None:
    """A file that is missing, short or no safetensors at all gives a CheckpointError with its path."""
    reader, bad = _write(tmp_path, 3), tmp_path / shard_name(1, 3)
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[:-40] if damage == "cut" else b"no tensors" * 10)
    with pytest.raises(CheckpointError, match="rank-00001-of-00003"):
        reader.whole("master/matrix")
