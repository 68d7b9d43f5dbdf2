"""Sharded state of a run as safetensors files, readable at any number of ranks.

Every rank writes the pieces that it holds into one file. A piece is an even chunk of a flat parameter (`ranks.chunk`),
so the position of any element follows from the parameter's size and the number of ranks that saved. Another number of
ranks reads other slices, without conversion or communication. Nothing is unpickled.

The format is that of safetensors (8 bytes of header length, a JSON header, raw values), so that any safetensors reader
can open a shard. This module has its own writer, to compute the checksum of the data in memory in the same pass without
blocking the training thread, and its own reader, to fetch only slices of a shard in a bucket.
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
_WRITE_BYTES = 4 << 20  # block that is hashed and then written, while it is still in the CPU cache
_READ_BYTES = 32 << 20  # most that one call to the store reads; the store's deadline applies to each call
_HEADER_BYTES = 100 << 20  # limit of safetensors


def shard_name(rank: int, world_size: int) -> str:
    """Return the file name of one rank's pieces."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_shard(file: IO[bytes], pieces: Mapping[str, Tensor]) -> FileFacts:
    """Write a rank's pieces, float32 on the CPU, and return size and checksum of the data in memory.

    Other threads can run meanwhile: neither writing nor hashing holds the interpreter lock.
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
    """Return the names of the pieces that hold a non-finite value."""
    return [name for name, piece in pieces.items() if not bool(torch.isfinite(piece).all())]


class ValueScan:
    """Incremental search for non-finite values in the bytes of a shard."""

    def __init__(self) -> None:
        self.finite = True
        self._left, self._header = b"", -1  # bytes of an incomplete value; header bytes left to skip

    def see(self, data: bytes) -> None:
        """Examine the next bytes."""
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
    """Byte range of a shard and the tensor that receives its values."""

    rank: int
    offset: int
    target: Tensor


class ShardReader:
    """Reader of slices of flat parameters from the shards of a checkpoint."""

    def __init__(self, store: Store, folder: str, manifest: CheckpointManifest) -> None:
        self._store, self._folder, self._manifest = store, folder, manifest
        self._headers: dict[int, dict[str, tuple[int, int]]] = {}

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Read elements low..high of the flat parameter `key` ("<kind>/<parameter>")."""
        return next(self.read_all({key: (low, high)}))[1]

    def whole(self, key: str) -> Tensor:
        """Read the whole parameter in its original shape."""
        return self.read(key, 0, self._size(key)).view(self._manifest.shapes[_parameter(key)])

    def read_all(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
        """Yield elements low..high of many flat parameters, in the given order, with few requests.

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
                "; use the config that it was saved with"
            )
        return prod(shapes[_parameter(key)])

    def _offset(self, rank: int, key: str, elements: int) -> int:
        """Return the byte offset of a key's values in a rank's file; raise if their number is not `elements`."""
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
        """Return the byte range of each key's values in a rank's file."""
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
