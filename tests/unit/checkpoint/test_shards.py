"""What several ranks wrote can be read at any number of ranks."""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regen_dist.checkpoint import shards
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.shards import ShardReader, shard_name, write_shard
from regen_dist.data.storage.store import Store
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
    files = {}
    for rank in range(world_size):
        pieces = {}
        for key, tensor in _whole().items():
            low, high = chunk(tensor.numel(), world_size, rank)
            pieces[key] = tensor.flatten()[low:high]
        path = folder / "one" / shard_name(rank, world_size)
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            files[path.name] = write_shard(file, pieces)
    manifest = CheckpointManifest(
        step=1, samples=1, config_hash="", version="", topology={"world_size": world_size}, state={}, metrics={},
        rollbacks=[], shapes=SHAPES, files=files,
    )  # fmt: skip
    return ShardReader(Store(folder), "one", manifest)


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    """Any reader of the format reads it; and the facts are those of the file."""
    pieces = {key: tensor.flatten() for key, tensor in _whole().items()} | {"master/none": torch.empty(0)}
    path = tmp_path / "shard.safetensors"
    with path.open("wb") as file:
        facts = write_shard(file, pieces)
    loaded = load_file(path)
    assert loaded.keys() == pieces.keys()
    assert all(torch.equal(loaded[key], piece) for key, piece in pieces.items())
    assert facts == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_all_pieces_come_in_order_and_in_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a parameter is larger than what one request may bring, and where requests hold many parameters."""
    asked: list[int] = []
    get_ranges = Store.get_ranges

    def counted(self: Store, name: str, ranges: list[tuple[int, int]], *more: int) -> list[bytes]:
        asked.append(sum(size for _, size in ranges))
        return get_ranges(self, name, ranges, *more)

    wanted = {key: (1, tensor.numel()) for key, tensor in _whole().items()}
    for most, requests in ((1 << 20, 3 * 3), (64, 30)):
        asked.clear()
        monkeypatch.setattr(shards, "_READ_BYTES", most)
        monkeypatch.setattr(Store, "get_ranges", counted)
        read = list(_write(tmp_path, 3).read_all(wanted))
        monkeypatch.undo()
        assert [key for key, _ in read] == list(wanted)
        assert all(torch.equal(tensor, _whole()[key].flatten()[1:]) for key, tensor in read)
        assert len(asked) <= requests
        assert max(asked) <= max(most + 64, 1000)


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
    reader, bad = _write(tmp_path, 3), tmp_path / "one" / shard_name(1, 3)
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[:-40] if damage == "cut" else b"no tensors" * 10)
    with pytest.raises(CheckpointError, match="rank-00001-of-00003"):
        reader.whole("ema/kernel")
