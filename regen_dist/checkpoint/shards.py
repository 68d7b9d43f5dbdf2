"""The sharded state of a run as safetensors files, readable at any number of ranks.

Every rank writes the pieces that it holds into one file. A piece is an even chunk of a flat parameter (`ranks.chunk`),
so where any element lies follows from the parameter's size and the number of ranks that saved: reading at another
number of ranks is reading other slices, without a conversion and without communication. Nothing is unpickled.

The format is safetensors' (8 bytes of header length, a JSON header, raw values), so that any of its readers reads a
shard. It is written and read here, because the checksum is to be of what was in memory, in one pass that lets the
training thread run; and because a shard may lie in a bucket, of which only slices are wanted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import accumulate
from math import prod
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regen_dist.checkpoint.manifest import CheckpointManifest, FileFacts
from regen_dist.data.storage.store import Store
from regen_dist.distributed.ranks import chunk
from regen_dist.errors import CheckpointError, ObjectCut, ObjectMissing
from regen_dist.jsontext import json_text

_ITEM_BYTES = 4  # all state is float32
_WRITE_BYTES = 4 << 20  # hashed and written at once: still in the cache when it is written
_READ_BYTES = 32 << 20  # by one call to the store: each has the store's deadline for itself
_HEADER_BYTES = 100 << 20  # safetensors' own limit


def shard_name(rank: int, world_size: int) -> str:
    """File name of one rank's pieces."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_shard(file: IO[bytes], pieces: Mapping[str, Tensor]) -> FileFacts:
    """Write a rank's pieces, float32 on the CPU. Returns the facts of what was to be written.

    Lets other threads run: neither writing nor hashing holds the interpreter.
    """
    digest, size = hashlib.sha256(), 0
    for part in (_header(pieces), *(_bytes_of(piece) for piece in pieces.values())):
        for start in range(0, len(part), _WRITE_BYTES):
            view = part[start : start + _WRITE_BYTES]
            digest.update(view)
            file.write(view)
        size += len(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


def nonfinite(pieces: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a value that is not finite."""
    return [name for name, piece in pieces.items() if not bool(torch.isfinite(piece).all())]


class ValueScan:
    """Looks for values that are not finite in the bytes of a shard, as they come."""

    def __init__(self) -> None:
        self.finite = True
        self._left, self._header = b"", -1  # bytes that are no whole value yet; bytes of the header to pass over

    def see(self, data: bytes) -> None:
        """The next bytes."""
        data = self._left + data
        if self._header < 0:
            if len(data) < 8:
                self._left = data
                return
            self._header = 8 + int.from_bytes(data[:8], "little")
        passed = min(self._header, len(data))
        self._header -= passed
        whole = passed + (len(data) - passed) // _ITEM_BYTES * _ITEM_BYTES
        self._left = data[whole:]
        values = np.frombuffer(data, np.float32, (whole - passed) // _ITEM_BYTES, passed)
        self.finite = self.finite and bool(np.isfinite(values).all())


def _header(pieces: Mapping[str, Tensor]) -> memoryview:
    ends = list(accumulate(piece.numel() * _ITEM_BYTES for piece in pieces.values()))
    starts = [0, *ends[:-1]]
    entries = {
        name: {"dtype": "F32", "shape": list(piece.shape), "data_offsets": [start, end]}
        for (name, piece), start, end in zip(pieces.items(), starts, ends, strict=True)
    }
    text = json_text(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes_of(piece: Tensor) -> memoryview:
    assert piece.dtype == torch.float32, f"state is float32, found {piece.dtype}"
    values = piece.detach().contiguous().view(-1).numpy()
    return memoryview(values.view(np.uint8))  # type: ignore[arg-type]  # an array is a buffer


class _Slice(NamedTuple):
    """Bytes of a shard, and the values that they go to."""

    rank: int
    offset: int
    target: Tensor


class ShardReader:
    """Reads parts of flat parameters out of the shards of a checkpoint.

    Args:
        store: the folder of all checkpoints.
        folder: name of this checkpoint in it.
        manifest: of this checkpoint.
    """

    def __init__(self, store: Store, folder: str, manifest: CheckpointManifest) -> None:
        self._store, self._folder, self._manifest = store, folder, manifest
        self._headers: dict[int, dict[str, tuple[int, int]]] = {}

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Elements low..high of the flat parameter behind `key` ("<kind>/<parameter>")."""
        return next(self.read_all({key: (low, high)}))[1]

    def whole(self, key: str) -> Tensor:
        """The whole parameter in its own shape."""
        return self.read(key, 0, self._size(key)).view(self._manifest.shapes[_parameter(key)])

    def read_all(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
        """Elements low..high of many flat parameters, in the order given, with few requests.

        Raises:
            CheckpointError: a parameter is not in the checkpoint, or a shard is missing, cut or damaged.
        """
        ready: list[tuple[str, Tensor]] = []
        slices: list[_Slice] = []
        waiting = 0
        for key, (low, high) in wanted.items():
            tensor = torch.empty(high - low)
            ready.append((key, tensor))
            for piece in self._slices(key, low, tensor):
                slices.append(piece)
                waiting += piece.target.numel() * _ITEM_BYTES
                if waiting >= _READ_BYTES:
                    self._fetch(slices)
                    slices, waiting = [], 0
            if not slices:
                yield from ready
                ready = []
        self._fetch(slices)
        yield from ready

    def _slices(self, key: str, low: int, target: Tensor) -> Iterator[_Slice]:
        size, high, most = self._size(key), low + target.numel(), _READ_BYTES // _ITEM_BYTES
        for rank in range(self._manifest.world_size):
            start, stop = chunk(size, self._manifest.world_size, rank)
            for first in range(max(low, start), min(high, stop), most):
                last = min(first + most, high, stop)
                offset = self._offset(rank, key, stop - start) + (first - start) * _ITEM_BYTES
                yield _Slice(rank, offset, target[first - low : last - low])

    def _fetch(self, slices: list[_Slice]) -> None:
        for rank in dict.fromkeys(piece.rank for piece in slices):
            own = [piece for piece in slices if piece.rank == rank]
            ranges = [(piece.offset, piece.target.numel() * _ITEM_BYTES) for piece in own]
            for piece, data in zip(own, self._get(rank, ranges), strict=True):
                piece.target.numpy()[:] = np.frombuffer(data, np.float32)

    def _get(self, rank: int, ranges: list[tuple[int, int]]) -> list[bytes]:
        name = f"{self._folder}/{shard_name(rank, self._manifest.world_size)}"
        try:
            return self._store.get_ranges(name, ranges)
        except (ObjectMissing, ObjectCut) as error:
            raise CheckpointError(f"checkpoint {self._store.url}/{name} cannot be read: {error}") from error

    def _size(self, key: str) -> int:
        shapes = self._manifest.shapes
        if _parameter(key) not in shapes:
            raise CheckpointError(
                f"{self._store.url}/{self._folder} holds no parameter '{_parameter(key)}': it was saved by another "
                "model config"
            )
        return prod(shapes[_parameter(key)])

    def _offset(self, rank: int, key: str, elements: int) -> int:
        """Where the values of a key begin in a rank's file, which must have so many of them."""
        if rank not in self._headers:
            self._headers[rank] = self._read_header(rank)
        start, stop = self._headers[rank].get(key, (0, -1))
        if stop - start != elements * _ITEM_BYTES:
            name = shard_name(rank, self._manifest.world_size)
            raise CheckpointError(
                f"checkpoint {self._store.url}/{self._folder}: {name} has {max(0, stop - start)} bytes of {key}, "
                f"{elements * _ITEM_BYTES} are expected"
            )
        return start

    def _read_header(self, rank: int) -> dict[str, tuple[int, int]]:
        """Where each key's values begin and end in a rank's file."""
        (length,) = self._get(rank, [(0, 8)])
        try:
            size = int.from_bytes(length, "little")
            if size > _HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            (text,) = self._get(rank, [(8, size)])
            entries: dict[str, Any] = json.loads(text)
            entries.pop("__metadata__", None)
            offsets = {key: entry["data_offsets"] for key, entry in entries.items() if entry["dtype"] == "F32"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            name = f"{self._store.url}/{self._folder}/{shard_name(rank, self._manifest.world_size)}"
            raise CheckpointError(f"checkpoint {name} has no readable header: {error}") from error
        return {key: (8 + size + start, 8 + size + end) for key, (start, end) in offsets.items()}


def _parameter(key: str) -> str:
    return key.split("/", 1)[1]
