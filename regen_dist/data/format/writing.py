"""Writing shards: samples in order, into tars of a set size, each with its index; every file whole or not at all.

A shard is finished when its index is there, which is written after its tar. What went into a shard depends on the
samples and the limits alone, so a writer that was killed is followed by one that goes on after the last finished shard
and makes the same bytes.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regen_dist.data.format.index import SampleFacts, read_index, scan_shard, write_index
from regen_dist.data.format.manifest import Note, Skip
from regen_dist.data.storage.store import Store
from regen_dist.jsontext import json_text

if TYPE_CHECKING:
    from types import TracebackType

DEFAULT_SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class NewSample:
    """A sample to write: `data` holds the bytes of a whole file, a video's or that of latents. `facts` are added to its
    JSON member."""

    key: str
    data: bytes
    described: SampleFacts
    extension: str = "mp4"
    facts: dict[str, Any] = field(default_factory=dict)


class ShardLimits(NamedTuple):
    """A shard is closed by the sample that reaches one of these."""

    size_bytes: int = DEFAULT_SHARD_BYTES
    samples: int | None = None


class Finished(NamedTuple):
    """What a killed writer left: its finished shards, and how many units (samples and skips) are in them."""

    shards: int
    units: int


def index_name(stem: str, number: int) -> str:
    """Name of the index of a writer's shard."""
    return f"{stem}-{number:06d}.parquet"


def finished_shards(store: Store, stem: str) -> Finished:
    """The shards of `stem` that are whole: index there, tar of the size that the index tells; up to the first that is
    not."""
    found = store.list(stem)
    shards = units = 0
    while (name := index_name(stem, shards)) in found:
        facts = read_index(store.get(name))[1]
        if facts["size"] and found.get(facts["name"]) != facts["size"]:
            break
        shards, units = shards + 1, facts["units"]
    return Finished(shards, units)


class ShardWriter:
    """Writes `STEM-000000.tar`, `STEM-000000.parquet`, and so on. A context manager: leaving it well closes the last
    shard, leaving it by an exception leaves nothing of the shard that was being written. A full disk raises DiskFull.

    Args:
        store: where to.
        stem: how the shards' names begin.
        limits: how large a shard becomes.
        after: the shards that are there already (`finished_shards`).
    """

    def __init__(
        self, store: Store, stem: str, limits: ShardLimits | None = None, after: Finished | None = None
    ) -> None:
        self._store, self._stem, self._limits = store, stem, limits or ShardLimits()
        self.shards, self.units = after or Finished(0, 0)
        self.made = 0
        self._reset()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._open_files.__exit__(kind, error, trace)  # tells a full disk as one
            return
        with self._open_files:
            if self._described or self._skipped:
                self._finish()

    def add(self, sample: NewSample) -> None:
        """Append a sample; closes the shard when that fills it."""
        if not self._described:
            self._open()
        facts = {name: value for name, value in vars(sample.described).items() if value is not None} | sample.facts
        members: dict[str, Any] = {"__key__": sample.key, sample.extension: sample.data}
        members["json"] = json_text(facts, sort_keys=True, ensure_ascii=False).encode()
        if sample.described.caption:
            members["txt"] = sample.described.caption.encode()
        self._tar.write(members)
        self._described[sample.key] = sample.described
        self.units += 1
        if self._is_full():
            self._finish()

    def skip(self, skip: Skip) -> None:
        """Note in the current shard what was left out."""
        self._skipped.append(skip)
        self.units += 1

    def note(self, note: Note) -> None:
        """Say in the current shard how samples of a source were converted; said twice it is kept once."""
        self._notes[note] = None

    def _reset(self) -> None:
        self._open_files = ExitStack()
        self._described: dict[str, SampleFacts] = {}
        self._skipped: list[Skip] = []
        self._notes: dict[Note, None] = {}

    @property
    def _name(self) -> str:
        return f"{self._stem}-{self.shards:06d}.tar"

    def _open(self) -> None:
        from webdataset.writer import TarWriter

        self._path: Path = self._open_files.enter_context(self._store.staging(self._name))
        self._file = self._open_files.enter_context(self._path.open("wb"))
        self._tar = self._open_files.enter_context(TarWriter(self._file, encoder=False, mtime=0))

    def _is_full(self) -> bool:
        limits = self._limits
        return self._file.tell() >= limits.size_bytes or len(self._described) == limits.samples

    def _finish(self) -> None:
        """Tar first, index second. A shard of which nothing is left has an index only."""
        samples = []
        facts: dict[str, Any] = {"name": self._name, "size": 0, "sha256": "", "units": self.units}
        facts["skipped"] = [skip.model_dump() for skip in self._skipped]
        facts["notes"] = [note.model_dump() for note in self._notes]
        if self._described:
            self._tar.close()
            self._file.close()
            samples = scan_shard(self._path, self._name, self._described)
            with self._path.open("rb") as file:
                facts |= {"size": self._path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            self._store.put_file(self._name, self._path)
        self._store.put(index_name(self._stem, self.shards), write_index(samples, facts))
        self._open_files.close()
        self._reset()
        self.shards, self.made = self.shards + 1, self.made + 1
