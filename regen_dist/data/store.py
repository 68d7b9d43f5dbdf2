"""Objects by URL: a local folder (`file://` or a plain path) or a bucket (`s3://`, `gs://`, `az://`), through obstore.

Credentials come from the standard environment variables and chains of each service, never from the URL, so that no
message, manifest or config can leak them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from regen_dist.errors import DataError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

BUCKET_SCHEMES = ("s3", "gs", "az")
_PIECE_BYTES = 4 << 20
ALLOWED = "a plain path, file://, s3://, gs:// or az://"


class Store:
    """One folder of objects. Cheap to make: the connection is opened on first use, so a `Store` crosses process
    boundaries.

    Args:
        url: a plain path, `file://`, `s3://bucket/prefix`, `gs://…` or `az://…`.

    Raises:
        DataError: the scheme is not one of these, or the URL carries credentials.
    """

    def __init__(self, url: str | Path) -> None:
        self.url, self.folder = _parse(str(url))
        self._backend: ObjectStore | None = None

    def __getstate__(self) -> dict[str, object]:
        """The URL alone: connections belong to the process that opened them."""
        return {"url": self.url, "folder": self.folder, "_backend": None}

    def get(self, name: str) -> bytes:
        """All bytes of an object; DataError when it is missing or cannot be read."""
        import obstore

        with self._failures(name, "read"):
            return bytes(obstore.get(self._open(), name).bytes())

    def get_range(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; DataError when the object is missing or shorter than that."""
        import obstore

        with self._failures(name, "read"):
            data = bytes(obstore.get_range(self._open(), name, start=offset, length=size)) if size else b""
        if len(data) != size:
            raise DataError(
                f"{self.url}/{name}: asked for {size} bytes at {offset}, got {len(data)}; the object is cut: "
                "run `regen shards verify` and build the shard again"
            )
        return data

    def sha256(self, name: str) -> str:
        """SHA-256 of an object in hex, read piece by piece."""
        import obstore

        digest = hashlib.sha256()
        with self._failures(name, "read"):
            for piece in obstore.get(self._open(), name).stream(min_chunk_size=_PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def put(self, name: str, data: bytes) -> None:
        """Write an object whole or not at all. Locally: temporary name, fsync, rename."""
        import obstore

        if self.folder is None:
            with self._failures(name, "write"):
                obstore.put(self._open(), name, data)
            return
        with self.staging(name) as temporary:
            temporary.write_bytes(data)
            self.put_file(name, temporary)

    def put_file(self, name: str, path: Path) -> None:
        """Move a finished local file (made under `staging`) to its name in the store, whole or not at all."""
        import obstore

        with self._failures(name, "write"):
            if self.folder is None:
                obstore.put(self._open(), name, path)
                return
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync(path)
            os.replace(path, target)
            _sync(target.parent)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Size in bytes of every object whose name starts with `prefix`, in order of name. An absent folder is
        empty."""
        import obstore

        if self.folder is not None and not self.folder.is_dir():
            return {}
        with self._failures(prefix or ".", "list"):
            found = {meta["path"]: int(meta["size"]) for page in obstore.list(self._open()) for meta in page}
        return {name: found[name] for name in sorted(found) if name.startswith(prefix)}

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A temporary path for an object that is being made: beside its target where that is local. Removed when
        left over."""
        if self.folder is None:
            with tempfile.TemporaryDirectory(prefix="regen-") as folder:
                yield Path(folder) / Path(name).name
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{Path(name).name}.{os.getpid()}.tmp"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _open(self) -> ObjectStore:
        if self._backend is None:
            from obstore.store import LocalStore, from_url

            self._backend = from_url(self.url) if self.folder is None else LocalStore(self.folder, mkdir=True)
        return self._backend

    @contextmanager
    def _failures(self, name: str, verb: str) -> Iterator[None]:
        """obstore's and the system's errors as DataErrors: their first line only, which holds no request headers."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            raise DataError(
                f"{self.url}/{name}: not found; check the URL, or run `regen shards verify {self.url}`"
            ) from error
        except (BaseError, OSError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise DataError(f"{self.url}/{name}: cannot {verb}: {lines[0]}") from error


def remove_leftovers(folder: Path) -> list[str]:
    """Remove the temporary files that a killed `staging` left in a folder. Returns their names."""
    left = sorted(path for path in folder.glob(".*.tmp") if path.name.rsplit(".", 2)[-2].isdigit())
    for path in left:
        path.unlink(missing_ok=True)
    return [path.name for path in left]


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds `folder` (or its nearest existing parent)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _parse(url: str) -> tuple[str, Path | None]:
    """The URL in one spelling, and its folder when it is local."""
    if "://" not in url and not url.startswith(("pipe:", "file:")):
        folder = Path(os.path.abspath(Path(url).expanduser()))
        return folder.as_uri(), folder
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        folder = Path(os.path.abspath(unquote(parts.path)))
        return folder.as_uri(), folder
    if parts.scheme not in BUCKET_SCHEMES:
        raise DataError(
            f"URL scheme {parts.scheme + ':'!r} is not supported (nothing is run through a shell); use {ALLOWED}"
        )
    if parts.username or parts.password or parts.query:
        raise DataError(
            f"{parts.scheme}://{parts.hostname}/…: a URL must not carry credentials or a query; "
            "set the service's environment variables instead (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            f"AWS_ENDPOINT)"
        )
    if not parts.netloc:
        raise DataError(f"{url}: no bucket; write {parts.scheme}://BUCKET/PREFIX")
    return url.rstrip("/"), None


def _sync(path: Path) -> None:
    """Ask the system to bring a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
