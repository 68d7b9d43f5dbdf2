"""Shard writer: samples in order, into tars of limited size, each with its index; all files are written atomically.

A shard is finished once its index exists, which is written after its tar. The content of a shard depends on the samples
and the limits only, so the successor of a killed writer continues after the last finished shard and writes the same
bytes.
"""

from __future__ import annotations

import io
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regen_dist.data.format.index import Sample, SampleFacts, read_index, scan_shard, write_index
from regen_dist.data.format.manifest import Note, Skip
from regen_dist.data.storage.local import file_sha256
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from regen_dist.jsontext import json_text

if TYPE_CHECKING:
    from types import TracebackType

DEFAULT_SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class NewSample:
    """Sample to write: `data` holds the bytes of a whole video or latent file. `facts` are added to its JSON member.
    `id` is the one in the index; None: that of its key."""

    key: str
    data: bytes
    described: SampleFacts
    extension: str = "mp4"
    facts: dict[str, Any] = field(default_factory=dict)
    id: int | None = None


class ShardLimits(NamedTuple):
    """Limits of a shard; the sample that reaches one of them closes it."""

    size_bytes: int = DEFAULT_SHARD_BYTES
    samples: int | None = None


class Finished(NamedTuple):
    """Finished shards of an earlier writer, and the number of units (samples and skips) in them."""

    shards: int
    units: int


def index_name(stem: str, number: int) -> str:
    """Return the name of the index of a writer's shard."""
    return f"{stem}-{number:06d}.parquet"


def finished_shards(store: Store, stem: str) -> Finished:
    """Return the finished shards of `stem`, up to the first gap: the index can be read, and the tar has the size in
    it."""
    found = store.list(stem)
    shards = units = 0
    while (name := index_name(stem, shards)) in found:
        data = store.get(name)
        try:
            facts = read_index(data)[1]
        except DataError:
            break  # damaged: made again
        if facts["size"] and found.get(facts["name"]) != facts["size"]:
            break
        shards, units = shards + 1, facts["units"]
    return Finished(shards, units)


def _tar_member(name: str, size: int) -> tarfile.TarInfo:
    """Return the header of a member, byte for byte that of `webdataset.TarWriter`, whose import takes torch's, too: the
    same samples make the same tars as those of earlier versions, which used it."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode, member.uname, member.gname = size, 0, 0o444, "bigdata", "bigdata"
    return member


class ShardWriter:
    """Writer of `STEM-000000.tar`, `STEM-000000.parquet`, and so on. A context manager: a normal exit closes the last
    shard, an exception discards the unfinished one. A full disk raises DiskFull.

    Args:
        store: store to write to.
        stem: prefix of the shards' names.
        limits: limits of a shard.
        after: the existing shards (`finished_shards`).
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
            self._open_files.__exit__(kind, error, trace)  # turns a full disk into DiskFull
            return
        with self._open_files:
            if self._described or self._skipped:
                self._finish()

    def add(self, sample: NewSample) -> None:
        """Append a sample; close the shard if it is full."""
        if not self._described:
            self._open()
        facts = {name: value for name, value in vars(sample.described).items() if value is not None} | sample.facts
        members = {sample.extension: sample.data}
        members["json"] = json_text(facts, sort_keys=True, ensure_ascii=False).encode()
        if sample.described.caption:
            members["txt"] = sample.described.caption.encode()
        for extension, data in sorted(members.items()):
            self._tar.addfile(_tar_member(f"{sample.key}.{extension}", len(data)), io.BytesIO(data))
        self._described[sample.key] = sample.described
        self._ids |= {} if sample.id is None else {sample.key: sample.id}
        self.units += 1
        if self._file.tell() >= self._limits.size_bytes or len(self._described) == self._limits.samples:
            self._finish()

    def skip(self, skip: Skip) -> None:
        """Record a skipped source in the current shard."""
        self._skipped.append(skip)
        self.units += 1

    def note(self, note: Note) -> None:
        """Record in the current shard how samples of a source were converted; repeated notes are stored once."""
        self._notes[note] = None

    def _reset(self) -> None:
        self._open_files = ExitStack()
        self._described: dict[str, SampleFacts] = {}
        self._ids: dict[str, int] = {}
        self._skipped: list[Skip] = []
        self._notes: dict[Note, None] = {}

    @property
    def _name(self) -> str:
        return f"{self._stem}-{self.shards:06d}.tar"

    def _open(self) -> None:
        self._path: Path = self._open_files.enter_context(self._store.staging(self._name))
        self._file = self._open_files.enter_context(self._path.open("wb"))
        stream = tarfile.open(fileobj=self._file, mode="w|", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - see below
        self._tar = self._open_files.enter_context(stream)

    def _finish(self) -> None:
        """Write the tar, then the index. A shard without samples has an index only."""
        samples: list[Sample] = []
        facts: dict[str, Any] = {"name": self._name, "size": 0, "sha256": "", "units": self.units}
        facts["skipped"] = [skip.model_dump() for skip in self._skipped]
        facts["notes"] = [note.model_dump() for note in self._notes]
        if self._described:
            self._tar.close()
            self._file.close()
            scanned = scan_shard(self._path, self._name, self._described)
            samples = [replace(sample, id=self._ids.get(sample.key, sample.id)) for sample in scanned]
            facts |= {"size": self._path.stat().st_size, "sha256": file_sha256(self._path)}
        self._put(write_index(samples, facts), facts["sha256"])
        self._open_files.close()
        self._reset()
        self.shards, self.made = self.shards + 1, self.made + 1

    def _put(self, index: bytes, sha256: str) -> None:
        """Write the tar (unless the shard is empty), then the index; DataError where they would not belong together:
        another process writes the same shard, and two machines need not make the same bytes."""
        name, tar = index_name(self._stem, self.shards), self._name if self._described else None
        self._store.delete(name)  # damaged, or of other bytes
        if tar:
            self._store.put_file(tar, self._path)
        mine = self._store.info(tar) if tar else None
        is_ours = self._store.put_new(name, index) or self._store.get(name) == index
        if tar and self._store.info(tar) != mine:
            is_ours &= self._store.sha256(tar) == sha256
        if not is_ours:
            self._store.delete(name)
            raise DataError(
                f"{self._store.url}/{name}: another process makes this shard, too; end one of them (each --task once "
                "at a time), then run the same command again, which makes what is missing"
            )
