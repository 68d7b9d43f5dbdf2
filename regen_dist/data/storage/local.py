"""Objects of a local folder. Writing goes through a temporary file beside the target, which is synced and then moved:
an object is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from regen_dist.data.storage.connection import checked_name
from regen_dist.data.storage.object_store import Listing, ObjectInfo, Range
from regen_dist.errors import AccessDenied, DataError, DiskFull, ObjectMissing
from regen_dist.shared_files import TEMPORARY, sync, temporary_beside

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalFolder:
    """The objects under a folder. Temporary files of writers are not objects."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._url = folder, folder.as_uri()

    def get(self, name: str) -> bytes:
        with self._failures(name, "read"):
            return self._path(name).read_bytes()

    def get_ranges(self, name: str, ranges: Sequence[Range], join_bytes: int) -> list[bytes]:
        """These ranges, each by itself; too few bytes where the object is cut."""
        with self._failures(name, "read"), self._path(name).open("rb", buffering=0) as file:
            return [_read(file.fileno(), offset, size) for offset, size in ranges]

    def pieces(self, name: str, piece_bytes: int) -> Iterator[bytes]:
        with self._failures(name, "read"), self._path(name).open("rb", buffering=0) as file:
            while piece := file.read(piece_bytes):
                yield piece

    def head(self, name: str) -> ObjectInfo:
        """Size of an object, and when it was written as its tag."""
        with self._failures(name, "read"):
            path = self._path(name)
            if path.is_dir():
                raise FileNotFoundError
            return _info(path)

    def list(self, prefix: str) -> Listing:
        """Every object whose name starts with `prefix`; an absent folder is empty. Links are followed, but for those to
        a folder above, which would go round for ever."""
        top = self.folder / prefix.rpartition("/")[0]
        found: dict[str, ObjectInfo] = {}
        with self._failures(prefix or ".", "list"):
            if not top.is_dir():
                return Listing(found, {})
            for folder, folders, files in os.walk(top, onerror=_raise, followlinks=True):
                folders[:] = [name for name in folders if not _leads_back(os.path.join(folder, name))]
                for file in files:
                    path = Path(folder, file)
                    name = path.relative_to(self.folder).as_posix()
                    if name.startswith(prefix) and not TEMPORARY.match(file):
                        try:
                            found[name] = _info(path)
                        except FileNotFoundError:
                            if path.is_symlink():  # anything else was deleted meanwhile
                                raise ObjectMissing(
                                    f"{path}: a link that leads nowhere; remove it, or bring back what it leads to"
                                ) from None
        return Listing(found, {})

    def put_file(self, name: str, path: Path) -> None:
        """Move a finished file on the same disk to its name."""
        with self._failures(name, "write"):
            target = self._path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            sync(path)
            os.replace(path, target)
            sync(target.parent)

    def put(self, name: str, data: bytes) -> None:
        with self.staging(name) as temporary:
            with self._failures(name, "write"):
                temporary.write_bytes(data)
            self.put_file(name, temporary)

    def put_new(self, name: str, data: bytes) -> bool:
        with self.staging(name) as temporary, self._failures(name, "write"):
            target = self._path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            sync(temporary)
            if not _link_new(temporary, target):
                return False
            sync(target.parent)
        return True

    def delete(self, name: str) -> None:
        with self._failures(name, "delete"):
            self._path(name).unlink(missing_ok=True)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A temporary path on the folder's disk; removed when left over."""
        with self._failures(name, "write"):
            self.folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(self.folder / Path(name).name)
        try:
            with full_disk(self.folder, f"{self._url}/{name}"):
                yield temporary
        finally:
            with suppress(OSError):  # of a disk that fails, which has been reported
                temporary.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / checked_name(name, self._url)

    @contextmanager
    def _failures(self, name: str, verb: str) -> Iterator[None]:
        where = f"{self._url}/{name}"
        try:
            with full_disk(self.folder, where):
                yield
        except FileNotFoundError:
            raise ObjectMissing(
                f"{where}: not found; check the URL, or run `regen shards verify {self._url}`"
            ) from None
        except PermissionError as error:
            raise AccessDenied(f"{where}: cannot {verb} it: {error.strerror}; check its owner and mode") from error
        except (OSError, ValueError) as error:
            raise DataError(
                f"{where}: cannot {verb} it: {getattr(error, 'strerror', None) or error}; check the path and its disk"
            ) from error


@contextmanager
def full_disk(folder: Path, where: str) -> Iterator[None]:
    """Turn "no space left" (and a quota that is used up) into DiskFull. `where` is what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"{where}: the disk of {folder} is full ({free_bytes(folder)} bytes free); make room and run the same again"
        ) from error


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds `folder` (or its nearest existing parent)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """Read these bytes, fewer at the end of the file; the system may give them in several parts."""
    data = os.pread(descriptor, size, offset)
    if len(data) in (0, size):
        return data
    parts, read = [data], len(data)
    while read < size and (data := os.pread(descriptor, size - read, offset + read)):
        parts.append(data)
        read += len(data)
    return b"".join(parts)


def _link_new(temporary: Path, target: Path) -> bool:
    """Give a file its name unless that is taken: by a hard link, or where the disk has none by an exclusive copy."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _copy_new(temporary, target)
    return True


def _copy_new(temporary: Path, target: Path) -> bool:
    try:
        with target.open("xb") as file:
            file.write(temporary.read_bytes())
    except FileExistsError:
        return False
    sync(target)
    return True


def _info(path: Path) -> ObjectInfo:
    found = path.stat()
    return ObjectInfo(found.st_size, f"written {found.st_mtime_ns}")


def _leads_back(folder: str) -> bool:
    """Return true if a folder is a link to one that it lies in."""
    if not os.path.islink(folder):
        return False
    real = os.path.realpath(folder)
    return any(os.path.realpath(above) == real for above in Path(folder).parents)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # deleted meanwhile
        raise error
