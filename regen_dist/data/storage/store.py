"""Objects by URL: a local folder (`file://` or a plain path), a bucket (`s3://`, `gs://`, `az://`); read only, a web
server (`https://`) or a repository of the Hugging Face hub (`hf://`).

Credentials come from the standard environment variables and chains of each service, never from the URL, so that no
message, manifest or config can leak them. connection.py has the deadlines and what errors mean.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from regen_dist.config.urls import Location, parse_url
from regen_dist.data.storage.connection import StoreLimits, list_repository
from regen_dist.data.storage.local import LocalFolder, full_disk
from regen_dist.data.storage.object_store import Listing, ObjectInfo, ObjectStoreFolder, Range, exact_bytes
from regen_dist.errors import DataError, ObjectCut, ObjectMissing
from regen_dist.shared_files import sync

# The files under a web address, or of a repository of the hub, as a read-only bucket.


class WebFolder(ObjectStoreFolder):
    """The files under a web address or in a repository. Belongs to the process that made it."""

    def __init__(self, place: Location, limits: StoreLimits) -> None:
        super().__init__(place, limits)
        self._whole: dict[str, tuple[bytes, str | None]] = {}  # of servers without ranges, until the last piece

    def get_pinned(self, name: str, offset: int, size: int, etag: str | None) -> bytes:
        """Exactly these bytes; DataError when the file is not the one that `etag` names any more.

        The tag is compared here, not sent: behind a redirect two servers have tags of their own. A server that knows no
        ranges sends the whole file, which is kept from the first piece to the last.
        """
        import obstore
        from obstore.exceptions import NotSupportedError

        def read() -> tuple[bytes, str | None]:
            if offset and (kept := self._whole.get(name)) is not None:
                return kept[0][offset : offset + size], kept[1]
            try:
                got = obstore.get(self._store(), name, options={"range": (offset, offset + size)})
                return bytes(got.bytes()), got.meta["e_tag"]
            except NotSupportedError:
                got = obstore.get(self._store(), name)
                self._whole[name] = whole = bytes(got.bytes()), got.meta["e_tag"]
                return whole[0][offset : offset + size], whole[1]

        data, tag = self._call("read", name, read)
        kept = self._whole.get(name)
        if kept is not None and (tag != etag or offset + size >= len(kept[0])):
            self._whole.pop(name, None)
        if tag != etag:
            raise DataError(f"{self._place.url}/{name}: it was replaced while it was read; read it again")
        return exact_bytes(data, offset, size, f"{self._place.url}/{name}")

    def head(self, name: str) -> ObjectInfo:
        """Size and tag of a file, by HEAD, or by a GET of one byte where a server refuses that."""
        import obstore
        from obstore.exceptions import BaseError

        def ask() -> ObjectInfo:
            try:
                meta = obstore.head(self._store(), name)
            except (BaseError, FileNotFoundError) as error:  # obstore takes 405 for an absence, too
                if _is_final(error):
                    raise
                meta = obstore.get(self._store(), name, options={"range": (0, 1)}).meta
            return ObjectInfo(int(meta["size"]), meta["e_tag"])

        return self._call("read", name, ask)

    def list(self, prefix: str) -> Listing:
        """The files of a repository whose names start with `prefix`; DataError for a web server."""
        if self._place.scheme != "hf":
            raise DataError(
                f"{self._place.url}: a web server has no listing; name each file in a list (.csv, .jsonl or .parquet "
                "with the column video)"
            )
        files = list_repository(self._place, prefix.rpartition("/")[0])
        return Listing({name: ObjectInfo(size, tag) for name, size, tag in files if name.startswith(prefix)}, {})

    def put(self, name: str, data: bytes | Path) -> None:
        self._refuse(name)

    def put_new(self, name: str, data: bytes) -> bool:
        self._refuse(name)

    def delete(self, name: str) -> None:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise DataError(
            f"{self._place.url}/{name}: {self._place.scheme}:// is read only; write to a folder, s3://, gs:// or az://"
        )


def _is_final(error: Exception) -> bool:
    """Return true if a GET would not help either: the file does not exist, or there was no answer at all."""
    return any(
        kind in str(error) for kind in ("status code: 404", "kind: Connect", "kind: Timeout", "following redirect")
    )


PIECE_BYTES = 32 << 20  # large objects are read in such pieces: each has the deadline for itself
JOIN_BYTES = 1 << 20


class Store:
    """One folder of objects. Cheap to make: the connection is opened on first use and never crosses to another
    process, so a `Store` does. Threads may share one.

    A name is the object's path under the URL, with "/" between its parts.

    Args:
        url: a plain path, `file://`, `s3://bucket/prefix`, `gs://…`, `az://…`, `https://…` or `hf://…`.
        limits: patience with a bucket.

    Raises:
        DataError: the URL is not one of these, or carries credentials. Every method raises its kinds: ObjectMissing,
            ObjectCut, AccessDenied, StoreUnavailable, DiskFull.
    """

    def __init__(self, url: str | Path, limits: StoreLimits = StoreLimits()) -> None:  # noqa: B008 - frozen
        try:
            self._place = parse_url(str(url))
        except ValueError as error:
            raise DataError(str(error)) from None
        self.url, self.folder = self._place.url, self._place.folder
        self._limits = limits
        self._backend: ObjectStoreFolder | LocalFolder | None = None

    def __getstate__(self) -> dict[str, object]:
        """Return the state without the connection, which belongs to the process that opened it."""
        return {**self.__dict__, "_backend": None}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def limits(self) -> StoreLimits:
        """Return the time limits of a bucket; setting them opens a new connection."""
        return self._limits

    @limits.setter
    def limits(self, limits: StoreLimits) -> None:
        if limits != self._limits:
            self._limits, self._backend = limits, None

    def get(self, name: str) -> bytes:
        """All bytes of an object, by one request: for small ones."""
        return self._open().get(name)

    def get_range(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; ObjectCut when the object is shorter than that."""
        return self.get_ranges(name, [(offset, size)])[0]

    def get_ranges(self, name: str, ranges: Sequence[Range], join_bytes: int = JOIN_BYTES) -> list[bytes]:
        """Exactly the bytes of each (offset, size), in the order asked for.

        Args:
            name: the object.
            ranges: ranges of bytes in any order; they may overlap, and may be empty.
            join_bytes: ranges with at most this gap between them come by one request. The requests run side by side.
        """
        found = self._open().get_ranges(name, ranges, join_bytes)
        for data, (offset, size) in zip(found, ranges, strict=True):
            if len(data) != size:
                raise ObjectCut.at(f"{self.url}/{name}", offset, size, len(data))
        return found

    def stream(self, name: str, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        """An object piece by piece; DataError when a bucket's object is replaced in between."""
        return self._open().pieces(name, piece_bytes)

    def sha256(self, name: str) -> str:
        """SHA-256 of an object in hex, read piece by piece."""
        digest = hashlib.sha256()
        for piece in self.stream(name):
            digest.update(piece)
        return digest.hexdigest()

    def download(self, name: str, path: Path) -> int:
        """Copy an object to a local file, whole or not at all. Returns its size in bytes."""
        folder = LocalFolder(path.parent.resolve())
        with folder.staging(path.name) as temporary, full_disk(folder.folder, str(path)):
            with temporary.open("wb") as file:
                size = sum(file.write(piece) for piece in self.stream(name))
            sync(temporary)
            os.replace(temporary, path)
        return size

    @property
    def read_only(self) -> bool:
        """Return true for web addresses, which cannot be written."""
        return self._place.read_only

    @property
    def can_list(self) -> bool:
        """Return true if objects can be listed, which a web server cannot."""
        return self._place.scheme not in ("http", "https")

    def size(self, name: str) -> int | None:
        """Bytes of an object; None when there is none."""
        found = self.info(name)
        return None if found is None else found.size

    def info(self, name: str) -> ObjectInfo | None:
        """Size and tag of an object, by one request whatever lies beside it; None when there is none."""
        try:
            return self._open().head(name)
        except ObjectMissing:
            return None

    def list(self, prefix: str = "") -> dict[str, int]:
        """Size in bytes of every object whose name starts with `prefix`, in order of name. An absent folder is
        empty."""
        return {name: found.size for name, found in self.list_found(prefix).items()}

    def list_found(self, prefix: str = "") -> dict[str, ObjectInfo]:
        """List objects like `list`, with size and tag (`etag`: of a local file when it was written)."""
        return self.list_all(prefix).found

    def list_all(self, prefix: str = "") -> Listing:
        """List objects like `list_found`, and those with unreadable keys, with the reason."""
        listing = self._open().list(prefix)
        return Listing(dict(sorted(listing.found.items())), dict(sorted(listing.unreadable.items())))

    def put(self, name: str, data: bytes) -> None:
        """Write an object whole or not at all, over what was there."""
        self._open().put(name, data)

    def put_new(self, name: str, data: bytes) -> bool:
        """Write an object only if there is none of that name; False when there was one. Of several that try at once
        exactly one gets True."""
        return self._open().put_new(name, data)

    def put_file(self, name: str, path: Path) -> None:
        """Move a finished local file (made under `staging`) to its name in the store, whole or not at all."""
        self._open().put_file(name, path)

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens when there is none."""
        self._open().delete(name)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A temporary path for an object that is being made: beside its target where that is local. Removed when left
        over. A full disk raises DiskFull."""
        backend = self._open()
        if isinstance(backend, LocalFolder):
            with backend.staging(name) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory(prefix="regen-") as folder, full_disk(Path(folder), f"{self.url}/{name}"):
            yield Path(folder) / Path(name).name

    def _open(self) -> ObjectStoreFolder | LocalFolder:
        if self._backend is None:
            here = self.folder
            kind = WebFolder if self._place.read_only else ObjectStoreFolder
            self._backend = LocalFolder(here) if here is not None else kind(self._place, self._limits)
        return self._backend
