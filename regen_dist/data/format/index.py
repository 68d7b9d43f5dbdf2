"""Index of a shard: byte range, properties and checksum of every sample in its tar.

One Parquet file beside each tar. Readers never parse tars; they fetch the byte ranges in the index and verify them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regen_dist.errors import DataError
from regen_dist.jsontext import json_text

if TYPE_CHECKING:
    import pyarrow as pa

    from regen_dist.data.format.catalogue import SampleRow

SCHEMA_VERSION = 2
VIDEO_EXTENSIONS = frozenset({"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts"})
PAYLOAD_EXTENSIONS = VIDEO_EXTENSIONS | {"safetensors"}  # file types of samples in shards that this package writes


@dataclass(frozen=True)
class Sample:
    """Row of the index: a video inside a shard, or the latents of one.

    Offset and size in bytes, sides in pixels as shown, `fps` the average frame rate, `motion` the mean change between
    neighbouring frames (`scenes.motion`; None if it was not measured).
    """

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
    motion: float | None
    caption: str | None
    source: str

    @property
    def name(self) -> str:
        """Return the name of this sample for messages."""
        return f"sample {self.key} in {self.shard}"


@dataclass(frozen=True)
class SampleFacts:
    """Properties of a sample in the index that do not follow from the tar's bytes."""

    frames: int
    height: int
    width: int
    fps: float
    source: str
    caption: str | None = None
    motion: float | None = None


def scan_shard(path: Path, name: str, described: dict[str, SampleFacts]) -> list[Sample]:
    """Index a finished local tar that `ShardWriter` wrote.

    Args:
        path: the tar.
        name: name of the shard in its dataset.
        described: properties by key; other samples are left out.
    """
    samples = []
    with tarfile.open(path) as tar, path.open("rb") as raw:
        for member in tar:
            key, extension = split_member(member.name)
            if member.isfile() and extension in PAYLOAD_EXTENSIONS and key in described:
                raw.seek(member.offset_data)
                samples.append(indexed(key, name, member, raw.read(member.size), described[key]))
    return samples


def split_member(name: str) -> tuple[str, str]:
    """Split the name of a tar member into key and lower-case extension like WebDataset: at the first dot of the file
    name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def indexed(key: str, shard: str, member: tarfile.TarInfo, data: bytes, facts: SampleFacts) -> Sample:
    """Return the index row of a tar member whose bytes are `data`."""
    return Sample(
        key=key,
        id=sample_id(key),
        shard=shard,
        member=member.name,
        offset=member.offset_data,
        size=member.size,
        checksum=checksum(data),
        **asdict(facts),
    )


def index_schema() -> pa.Schema:
    """Return the columns of an index."""
    import pyarrow as pa

    required = {
        "key": pa.string(), "id": pa.int64(), "shard": pa.string(), "member": pa.string(), "offset": pa.int64(),
        "size": pa.int64(), "checksum": pa.string(), "frames": pa.int32(), "height": pa.int32(), "width": pa.int32(),
        "fps": pa.float64(),
    }  # fmt: skip
    fields = [pa.field(name, kind, nullable=False) for name, kind in required.items()]
    optional = [pa.field("motion", pa.float32()), pa.field("caption", pa.string())]
    return pa.schema([*fields, *optional, pa.field("source", pa.string(), nullable=False)])


def write_index(samples: Sequence[Sample], facts: dict[str, Any]) -> bytes:
    """Return a Parquet file of one shard's samples; `facts` (JSON) about the shard become its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {"regen.schema_version": str(SCHEMA_VERSION), "regen.shard": json_text(facts, sort_keys=True)}
    table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=index_schema().with_metadata(metadata))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_index(data: bytes) -> tuple[pa.Table, dict[str, Any]]:
    """Return the samples and the facts that `write_index` stored; raise DataError if it is not such a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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


def samples_of(table: pa.Table) -> list[Sample]:
    """Return the rows of an index as `Sample`s."""
    return [Sample(**row) for row in table.to_pylist()]


def sample_id(key: str) -> int:
    """Return a sample's id, stable over rebuilds: the first 63 bits of the SHA-256 of its key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def checksum(data: bytes) -> str:
    """Return a BLAKE2b digest of 16 bytes in hex, faster than SHA-256 and as safe against accidental damage."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def check_bytes(row: SampleRow | Sample, data: bytes, url: str) -> None:
    """Raise DataError if `data` differs from what was written for a sample of the dataset at `url`."""
    if len(data) != row.size or checksum(data) != row.checksum:
        raise DataError(
            f"the bytes differ from those that were written (checksum {checksum(data)}, the index says "
            f"{row.checksum}); run `regen shards verify {url}` and build {row.shard} again"
        )
