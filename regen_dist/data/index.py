"""The index: where every sample's bytes lie inside its shard, what is in them, and how to tell that they are whole.

A dataset is a folder of WebDataset tars, one Parquet index beside each, and `manifest.json`, which is written
last: a folder without it is not finished. Readers never parse tars; they fetch byte ranges that the index names,
    and check them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from regen_dist.data.store import Store
from regen_dist.errors import DataError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
VIDEO_EXTENSION = "mp4"
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("member", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("checksum", pa.string(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("source", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Sample:
    """One row of the index: a video inside a shard. Offset and size in bytes, sides in pixels."""

    key: str
    id: int
    shard: str
    member: str
    offset: int
    size: int
    checksum: str
    frames: int
    height: int
    width: int
    fps: float
    caption: str | None
    source: str

    @property
    def name(self) -> str:
        """How messages call this sample."""
        return f"sample {self.key} in {self.shard}"


class Skip(BaseModel):
    """A source, or a segment of one, that was left out, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    segment: int | None = None
    reason: str


class ShardEntry(BaseModel):
    """A shard in the manifest: sizes in bytes, SHA-256 in hex of the tar and of its index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: int
    sha256: str
    index: str
    index_sha256: str
    samples: int


class Totals(BaseModel):
    """Sums over a dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: int
    samples: int
    frames: int
    seconds: float
    bytes: int


class Manifest(BaseModel):
    """What a dataset consists of. `options` are those it was built with; `skipped` is what was left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    fingerprint: str
    totals: Totals
    shards: tuple[ShardEntry, ...]
    options: dict[str, Any]
    skipped: tuple[Skip, ...]


class Dataset:
    """All samples of a built dataset, addressed by row. Crosses process boundaries.

    Args:
        store: where the shards are.
        manifest: the folder's manifest.
        table: the indices of all shards in the manifest's order (`INDEX_SCHEMA`).
    """

    def __init__(self, store: Store, manifest: Manifest, table: pa.Table) -> None:
        self.store, self.manifest, self.table = store, manifest, table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def fingerprint(self) -> str:
        """Changes when a sample, its bytes or the order of samples does; not when the dataset is moved or copied."""
        return self.manifest.fingerprint

    @cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """Sample ids by row, int64 [N]."""
        ids: npt.NDArray[np.int64] = self.table["id"].to_numpy()
        return ids

    def sample(self, row: int) -> Sample:
        """The index entry of a row in [0, len)."""
        return Sample(**{name: self.table[name][row].as_py() for name in INDEX_SCHEMA.names})

    def read(self, sample: Sample) -> bytes:
        """A sample's video file; DataError naming shard and key when the bytes are not those that were written."""
        data = self.store.get_range(sample.shard, sample.offset, sample.size)
        if checksum(data) != sample.checksum:
            raise DataError(
                f"{sample.name}: the bytes differ from those that were written (checksum {checksum(data)}, the "
                f"index says "
                f"{sample.checksum}); run `regen shards verify {self.store.url}` and build this shard again"
            )
        return data


def open_dataset(url: str | Path) -> Dataset:
    """Read the manifest and every index of a built dataset; DataError when one is missing, damaged or of another
    version."""
    store = Store(url)
    manifest = read_manifest(store)
    tables = []
    for entry in manifest.shards:
        data = store.get(entry.index)
        if hashlib.sha256(data).hexdigest() != entry.index_sha256:
            raise DataError(
                f"{store.url}/{entry.index}: differs from the manifest; run the build again, it makes what is missing"
            )
        tables.append(read_index(data)[0])
    table = pa.concat_tables(tables).combine_chunks() if tables else INDEX_SCHEMA.empty_table()
    return Dataset(store, manifest, table)


def read_manifest(store: Store) -> Manifest:
    """The manifest of a folder; DataError when there is none or it is of another schema version."""
    if MANIFEST not in store.list(MANIFEST):
        raise DataError(
            f"{store.url}: there is no {MANIFEST}, so no finished dataset; build one with `regen shards build "
            f"SOURCE --out`"
        )
    try:
        raw = json.loads(store.get(MANIFEST))
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{store.url}/{MANIFEST}: schema version {version}, this program reads {SCHEMA_VERSION}; build the "
                f"shards again"
            )
        return Manifest.model_validate(raw)
    except (ValidationError, ValueError) as error:
        raise DataError(
            f"{store.url}/{MANIFEST}: damaged ({str(error).splitlines()[0]}); run the build again"
        ) from error


def scan_shard(path: Path, name: str) -> list[Sample]:
    """Index a finished tar: where each video lies and its checksum, with frames, sides, fps and caption from its
    JSON."""
    described: dict[str, dict[str, Any]] = {}
    videos: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.rpartition(".")
            if extension == "json":
                file = tar.extractfile(member)
                described[key] = json.loads(file.read()) if file else {}
            elif extension == VIDEO_EXTENSION:
                videos[key] = member
    with path.open("rb") as raw:
        return [_scanned(raw, key, name, member, described[key]) for key, member in videos.items()]


def _scanned(raw: IO[bytes], key: str, shard: str, member: tarfile.TarInfo, facts: dict[str, Any]) -> Sample:
    raw.seek(member.offset_data)
    return Sample(
        key=key,
        id=sample_id(key),
        shard=shard,
        member=member.name,
        offset=member.offset_data,
        size=member.size,
        checksum=checksum(raw.read(member.size)),
        **{field: facts[field] for field in ("frames", "height", "width", "fps", "caption", "source")},
    )


def write_index(samples: list[Sample], facts: dict[str, Any]) -> bytes:
    """A Parquet file of one shard's samples; `facts` (JSON) about the shard go into its metadata."""
    metadata = {"regen.schema_version": str(SCHEMA_VERSION), "regen.shard": json.dumps(facts, sort_keys=True)}
    table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=INDEX_SCHEMA.with_metadata(metadata))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_index(data: bytes) -> tuple[pa.Table, dict[str, Any]]:
    """The samples and the facts that `write_index` stored; DataError when it is not such a file."""
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not an index: {str(error).splitlines()[0]}; run the build again") from error
    metadata = table.schema.metadata or {}
    version = metadata.get(b"regen.schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise DataError(
            f"the index has schema version {version}, this program reads {SCHEMA_VERSION}; build the shards again"
        )
    return table.replace_schema_metadata(None), json.loads(metadata[b"regen.shard"])


def dataset_fingerprint(table: pa.Table) -> str:
    """Hex digest over schema version, ids and checksums in row order."""
    digest = hashlib.blake2b(f"regen-dataset-{SCHEMA_VERSION}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(table["id"].to_numpy()).tobytes())
    for text in table["checksum"].to_pylist():
        digest.update(text.encode())
    return digest.hexdigest()


def sample_id(key: str) -> int:
    """A sample's number, stable over rebuilds: the first 63 bits of the SHA-256 of its key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def checksum(data: bytes) -> str:
    """BLAKE2b of 16 bytes, in hex: faster than SHA-256, and as sure against accidents."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
