"""Bounded cache of byte strings on a local disk, shared by all processes of a node.

Layout of the folder: `ab/<name>`, one file an entry, in 256 sub-folders by the first two digits of its name;
`filling/`, entries in progress; `usage`, a small record of the bytes in use, whose lock (flock) coordinates the
processes. Space is reserved before an entry is written, so the record is never below the actual usage, even after a
crash; if it is above (a failed write, an entry written twice), the next eviction corrects it. Nothing is synced: after
a crash of the machine an entry may be damaged, which its reader's checksum detects.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import struct
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from regen_dist.errors import DataError
from regen_dist.shared_files import boot_id

if TYPE_CHECKING:
    from typing_extensions import Buffer

Int64s = npt.NDArray[np.int64]

LARGEST_SHARE = 8  # an entry of more than 1/8 of the limit would evict too much: it is not cached
KEEP = 0.9  # share of the limit that stays in use after an eviction
_TOUCH_S = 60.0  # resolution of "least recently used": a hit writes to the disk at most this often per entry
_PAUSE_S = 60.0  # wait after a failed write (full disk) before the next one
_LOCK_S = 1.0  # longest wait for the lock; then the entry is not cached
_BLOCK = 4096  # file sizes are rounded up to whole blocks
_NAME = re.compile(r"[0-9a-f]{32,128}")
_FILLING, _USAGE = "filling", "usage"
_RECORD = struct.Struct("<q8s")


class _Entry(NamedTuple):
    path: str
    used_ns: int
    size: int


class DiskCache:
    """Cache of byte strings by key in `folder`, with at most `limit_bytes` on disk (unfinished files included).

    Any number of processes and threads of one node may use one folder at once. Disk errors never raise: an entry that
    cannot be read is a miss, one that cannot be written is skipped, and `problem` gives the reason. Pickled as the
    folder and the limit; each object has its own counters.

    Args:
        folder: folder on a local disk, created if absent.
        limit_bytes: limit beyond which the least recently used entries are evicted.

    Attributes:
        hits, misses: numbers of entries that `get` found and did not find.
        evicted: entries that this object removed to make room.
        skipped: entries not cached: larger than limit / 8, or no space or lock was available in time.
        failures: reads and writes that the system refused.
        problem: message on the first of these failures and its remedy; None if there was none.

    Raises:
        DataError: the limit is not positive, or the folder cannot be made or written to.
    """

    def __init__(self, folder: Path | str, limit_bytes: int) -> None:
        if limit_bytes <= 0:
            raise DataError(f"the cache's limit is {limit_bytes} bytes; give it a positive size, or no cache folder")
        self.folder, self.limit_bytes = os.path.abspath(folder), limit_bytes
        self.hits = self.misses = self.evicted = self.skipped = self.failures = 0
        self.problem: str | None = None
        self._paused_until = 0.0
        self._boot = boot_id()  # after a reboot the record may be older than the files
        try:
            os.makedirs(os.path.join(self.folder, _FILLING), exist_ok=True)
            os.close(self._open_usage())
        except OSError as error:
            raise DataError(
                f"the cache folder {self.folder} cannot be used: {error.strerror or error}; name a folder "
                "on a local disk that this user may write to, or no cache folder"
            ) from error

    def __reduce__(self) -> tuple[type[DiskCache], tuple[str, int]]:
        return DiskCache, (self.folder, self.limit_bytes)

    def get(self, key: str) -> bytes | None:
        """Return the value of `key`, or None. Callers should verify a checksum: see the module docstring."""
        data = None
        try:
            with open(self.path(key), "rb", buffering=0) as file:
                data = file.readall()
                if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH_S:
                    os.utime(file.fileno())
        except FileNotFoundError:
            pass
        except OSError as error:
            self._failed("read", error)
        self.hits, self.misses = self.hits + (data is not None), self.misses + (data is None)
        return data

    def put(self, key: str, data: Buffer) -> None:
        """Store `data` (any buffer) under `key` atomically, replacing an existing value."""
        view = memoryview(data).cast("B")
        if _occupied(view.nbytes) > self.limit_bytes // LARGEST_SHARE:
            self.skipped += 1
        elif time.monotonic() >= self._paused_until:
            try:
                self._fill(self.path(key), view)
            except OSError as error:
                self._paused_until = time.monotonic() + _PAUSE_S
                self._failed("write", error)

    def drop(self, key: str) -> None:
        """Remove `key`, for example because its checksum is wrong."""
        try:
            os.unlink(self.path(key))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._failed("remove from", error)

    def path(self, key: str) -> str:
        """Return the path of `key`: named like it if it has 32 to 128 hex digits, else by its hash."""
        name = key if _NAME.fullmatch(key) else hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return os.path.join(self.folder, name[:2], name)

    def _failed(self, verb: str, error: OSError) -> None:
        self.failures += 1
        self.problem = self.problem or (
            f"the cache folder {self.folder}: cannot {verb} it: {error.strerror or error}; reading continues without "
            "it. Free its disk, or give it a smaller limit or another folder"
        )

    def _fill(self, path: str, view: memoryview) -> None:
        started = self._start(view.nbytes)
        if started is None:
            self.skipped += 1
            return
        temporary, descriptor = started
        try:
            while view:
                view = view[os.write(descriptor, view) :]
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)

    def _start(self, size: int) -> tuple[str, int] | None:
        """Reserve `size` bytes and open a temporary file of that size: (path, descriptor); None if there is no space.

        The file is locked as long as its writer lives, so that others recognise files of killed writers.
        """
        with self._usage() as usage:
            if usage is None or not self._reserve(usage, _occupied(size)):
                return None
            temporary = os.path.join(self.folder, _FILLING, f"{os.getpid()}-{secrets.token_hex(8)}")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, size)
            return temporary, descriptor

    def _reserve(self, usage: int, size: int) -> bool:
        """Add `size` to the record; evict or recount if necessary. Requires the lock."""
        used = self._read_record(usage)
        if used is None or used + size > self.limit_bytes:
            used = self._evict(size)
        fits = used + size <= self.limit_bytes
        os.pwrite(usage, self._record(used + size * fits), 0)
        return fits

    def _evict(self, needed: int) -> int:
        """Count the entries, evict if `needed` bytes do not fit, and return the bytes in use. Requires the lock.

        Two passes over the folder, so that 16 bytes an entry are enough memory.
        """
        used_ns, sizes = array("q"), array("q")
        used = self._in_flight()  # first: files finished meanwhile are counted twice rather than not at all
        for entry in self._entries():
            used_ns.append(entry.used_ns)
            sizes.append(entry.size)
        used += sum(sizes)
        if used + needed <= self.limit_bytes:
            return used
        target = int(KEEP * self.limit_bytes) - needed
        newest = _eviction_cutoff(np.array(used_ns, np.int64), np.array(sizes, np.int64), used - target)
        for entry in self._entries():
            if used > target and entry.used_ns <= newest:
                with suppress(FileNotFoundError):
                    os.unlink(entry.path)
                used, self.evicted = used - entry.size, self.evicted + 1
        return used

    def _entries(self) -> Iterator[_Entry]:
        """Yield the cache's own files, no others in the folder."""
        for number in range(256):
            for file in _files(os.path.join(self.folder, f"{number:02x}")):
                if _NAME.fullmatch(file.name):
                    with suppress(FileNotFoundError):  # dropped meanwhile
                        stat = file.stat(follow_symlinks=False)
                        yield _Entry(file.path, stat.st_mtime_ns, _occupied(stat.st_size))

    def _in_flight(self) -> int:
        """Return the bytes reserved by active writers; remove files of killed ones. Requires the lock."""
        total = 0
        for file in _files(os.path.join(self.folder, _FILLING)):
            with suppress(FileNotFoundError):  # finished meanwhile
                descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    os.unlink(file.path)
                except BlockingIOError:
                    total += _occupied(os.fstat(descriptor).st_size)
                finally:
                    os.close(descriptor)
        return total

    @contextmanager
    def _usage(self) -> Iterator[int | None]:
        """Hold the lock and yield the record's descriptor; None if the lock is not available in time.

        Opened anew each time: a lock belongs to one opening of a file, so threads and forked processes exclude each
        other too.
        """
        descriptor = self._open_usage()
        try:
            yield descriptor if _lock(descriptor) else None
        finally:
            os.close(descriptor)

    def _open_usage(self) -> int:
        return os.open(os.path.join(self.folder, _USAGE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _read_record(self, usage: int) -> int | None:
        """Return the bytes in use; None if the record is absent, damaged or older than the last boot."""
        data = os.pread(usage, _RECORD.size + 1, 0)
        if len(data) != _RECORD.size:
            return None
        used: int = _RECORD.unpack(data)[0]
        return used if used >= 0 and data == self._record(used) else None

    def _record(self, used: int) -> bytes:
        return _RECORD.pack(used, hashlib.blake2b(f"{used} {self._boot}".encode(), digest_size=8).digest())


def _eviction_cutoff(used_ns: Int64s, sizes: Int64s, excess: int) -> int:
    """Return the time of last use up to which entries must be evicted to free `excess` bytes."""
    order = np.argsort(used_ns, kind="stable")
    last = np.searchsorted(np.cumsum(sizes[order]), excess)
    return int(used_ns[order[min(int(last), len(order) - 1)]]) if len(order) else 0


def _files(folder: str) -> Iterator[os.DirEntry[str]]:
    with suppress(FileNotFoundError), os.scandir(folder) as files:
        yield from files


def _lock(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        else:
            return True


def _occupied(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
