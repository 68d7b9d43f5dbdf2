"""Dataset catalogue: location and shape of every row in one local, memory-mapped file of 64 bytes a row.

The file is compiled once a node from the dataset's indices and shared by all ranks and workers through the page cache:
a process holds only the pages that it touches, so a hundred million samples need 6.4 GB of disk and almost no memory.
Texts (keys, captions, sources) stay in the indices and are fetched when a message needs them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from regen_dist.data.format.index import Sample, check_bytes, read_index, samples_of
from regen_dist.data.format.manifest import DatasetManifest, ShardEntry, manifest_bytes, parse_manifest, read_all
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

RECORD = np.dtype(
    [
        ("id", "<i8"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("shard", "<i4"),
        ("frames", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("fps", "<f4"),
        ("motion", "<f4"),
        ("checksum", "V16"),
    ]
)
_STALE_S, _UNUSED_S = 3600.0, 90 * 24 * 3600.0  # of what a killed process left, and of what no run has opened
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_COLUMNS = ("id", "offset", "size", "frames", "height", "width", "fps")


class SampleRow(NamedTuple):
    """Location and shape of a sample. `row` is its number in its dataset; sides in pixels, offset and size in bytes."""

    row: int
    id: int
    shard: str
    offset: int
    size: int
    checksum: str
    frames: int
    height: int
    width: int
    fps: float


class Dataset:
    """Samples of a dataset, addressed by row. Cheap to send to another process.

    Args:
        store: store of the manifest and the indices.
        manifest: the dataset's manifest.
        path: the compiled file of `RECORD`s, whose name changes with anything in the manifest.
    """

    def __init__(self, store: Store, manifest: DatasetManifest, path: Path) -> None:
        self.store, self.manifest, self.catalogue = store, manifest, path
        self.shards = Store(manifest.shards_url) if manifest.shards_url else store

    def __getstate__(self) -> dict[str, object]:
        """Return the state without the mapping (the other process maps the same file) and without the list of skipped
        sources, which may be longer than that of the shards."""
        state = {name: value for name, value in vars(self).items() if name != "records"}
        return state | {"manifest": self.manifest.model_copy(update={"skipped": ()})}

    def __len__(self) -> int:
        return self.manifest.totals.samples

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint: it changes with a sample, its bytes or the order of samples, not with the
        location."""
        return self.manifest.fingerprint

    @cached_property
    def records(self) -> npt.NDArray[np.void]:
        """Return all rows [N] of `RECORD`, memory-mapped and read-only."""
        try:
            records: npt.NDArray[np.void] = np.load(self.catalogue, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self.catalogue}: damaged ({error}); remove it and run the same again") from error
        return records

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.records["id"], dtype=np.int64)

    def row(self, row: int) -> SampleRow:
        """Return location and shape of the sample of a row in [0, len)."""
        # All fields in one call: one at a time takes five times as long, for every sample of every epoch.
        number, offset, size, shard, frames, height, width, fps, _, digest = self.records[row].item()
        name = self.manifest.shards[shard].name
        return SampleRow(row, number, name, offset, size, bytes(digest).hex(), frames, height, width, fps)

    def sample(self, row: int) -> Sample:
        """Return the whole index entry of a row in [0, len); reads the index of its shard."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return samples_of(self.index(number).slice(row - int(self._starts[number]), 1))[0]

    def index(self, number: int) -> pa.Table:
        """Return the index of a shard by its number; raise DataError if it differs from the manifest."""
        entry = self.manifest.shards[number]
        return _checked_index(self.store, entry, self.store.get(entry.index))

    def table(self) -> pa.Table:
        """Return all index entries with their texts, in memory: for small datasets and for inspection."""
        import pyarrow as pa

        indices = [entry.index for entry in self.manifest.shards]
        return pa.concat_tables([read_index(data)[0] for _, data in read_all(self.store, indices)])

    def read(self, row: SampleRow | Sample) -> bytes:
        """Return a sample's file; raise DataError with the shard's name if the bytes differ from those written."""
        data = self.shards.get_range(row.shard, row.offset, row.size)
        check_bytes(row, data, self.store.url)
        return data

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(entry.samples for entry in self.manifest.shards)])


def cache_folder(configured: str | Path | None = None) -> Path:
    """Return the folder of local copies: as configured, else $REGEN_CACHE, else the user's cache folder.

    Raises:
        DataError: its home folder is not known (HOME is not set, and the user id has no name, as in containers).
    """
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "regen"
    folder = os.path.expanduser(configured or os.environ.get("REGEN_CACHE") or users)
    if folder.startswith("~"):
        raise DataError(
            f"{folder}: the home folder for local copies is not known; set data.read.cache, REGEN_CACHE or HOME to a "
            "folder"
        )
    return Path(folder).absolute()


def open_dataset(url: str | Path, cache: str | Path | None = None, limits: StoreLimits = StoreLimits()) -> Dataset:  # noqa: B008
    """Read the manifest of a dataset and compile its indices, unless this node has done so before.

    Args:
        cache: the cache folder that is configured (see `cache_folder`).
        limits: time limits of a bucket.

    Raises:
        DataError: manifest or an index is missing, damaged or of another version, or the disk is full.
    """
    store = Store(url, limits)
    data = manifest_bytes(store)
    manifest = parse_manifest(store, data)
    folder = cache_folder(cache) / "catalogues"
    path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.npy"
    make_once(path, lambda file: _compile(store, manifest, file))
    return Dataset(store, manifest, path)


def make_once(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Create a local file that all processes of this machine share, unless it exists: by one process, atomically. It
    may be memory-mapped: it has no holes, so a full disk is an error here, not a bus error later.

    Raises:
        DataError: it cannot be written.
    """
    if path.exists():
        with suppress(OSError):  # another user's
            os.utime(path)
        return
    with _disk_failures(path.parent), _alone(path):
        if path.exists():
            return
        _remove_stale(path)
        temporary = path.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left of a file, and all that has long been unused. The folder may be shared by
    machines, whose locks some network disks keep apart: what was written lately may be in use."""
    for left in path.parent.iterdir():
        with suppress(OSError):
            is_ours = left.match(f"{path.stem}.*.tmp")
            if time.time() - left.stat().st_mtime >= (_STALE_S if is_ours else _UNUSED_S):
                left.unlink()


def _compile(store: Store, manifest: DatasetManifest, file: IO[bytes]) -> None:
    shape = (manifest.totals.samples,)
    np.lib.format.write_array_header_1_0(file, {"descr": RECORD.descr, "fortran_order": False, "shape": shape})
    for records in _records(store, manifest):
        file.write(records.tobytes())


def _records(store: Store, manifest: DatasetManifest) -> Iterator[npt.NDArray[np.void]]:
    indices = read_all(store, [entry.index for entry in manifest.shards])
    for number, (entry, (_, data)) in enumerate(zip(manifest.shards, indices, strict=True)):
        yield _of_table(_checked_index(store, entry, data), number)


def _checked_index(store: Store, entry: ShardEntry, data: bytes) -> pa.Table:
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise DataError(
            f"{store.url}/{entry.index}: differs from the manifest, or the dataset was built again meanwhile; run the "
            f"same again, and if that does not help `regen shards verify {store.url}`, which says what to "
            "remove and make anew"
        )
    return read_index(data)[0]


def _of_table(table: pa.Table, shard: int) -> npt.NDArray[np.void]:
    records = np.zeros(table.num_rows, RECORD)
    for name in _COLUMNS:
        records[name] = table[name].to_numpy()
    records["shard"] = shard
    records["motion"] = table["motion"].fill_null(float("nan")).to_numpy()
    digests = b"".join(bytes.fromhex(text) for text in table["checksum"].to_pylist())
    records["checksum"] = np.frombuffer(digests, "V16")
    return records


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold an exclusive lock among the processes of this machine. On a disk without locks (Lustre mounted without
    `flock`) several may make the same file, which costs time alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


@contextmanager
def _disk_failures(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: the dataset's catalogue cannot be written: {error.strerror or error}; make room there, or set "
            "data.read.cache or REGEN_CACHE to a folder on another disk"
        ) from error
