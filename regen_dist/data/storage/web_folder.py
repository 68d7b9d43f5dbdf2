"""The files under a web address, or of a repository of the hub, as a read-only bucket (web.py)."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from regen_dist.data.storage.bucket import Listing, ObjectBucket, ObjectInfo, exact_bytes
from regen_dist.data.storage.web import list_repository
from regen_dist.errors import DataError


class WebFolder(ObjectBucket):
    """The files under a web address or in a repository. Belongs to the process that made it."""

    def get_pinned(self, name: str, offset: int, size: int, etag: str | None) -> bytes:
        """Exactly these bytes; DataError when the file is not the one that `etag` names any more.

        The tag is compared here, not sent: behind a redirect two servers have tags of their own. A server that knows no
        ranges sends the whole file.
        """
        import obstore
        from obstore.exceptions import NotSupportedError

        def read() -> tuple[bytes, str | None]:
            try:
                got = obstore.get(self._store(), name, options={"range": (offset, offset + size)})
                return bytes(got.bytes()), got.meta["e_tag"]
            except NotSupportedError:
                got = obstore.get(self._store(), name)
                return bytes(got.bytes())[offset : offset + size], got.meta["e_tag"]

        data, tag = self._call("read", name, read)
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
                if _settled(error):
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
        """Refuse: DataError."""
        self._refuse(name)

    def put_new(self, name: str, data: bytes) -> bool:
        """Refuse: DataError."""
        self._refuse(name)

    def delete(self, name: str) -> None:
        """Refuse: DataError."""
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise DataError(
            f"{self._place.url}/{name}: {self._place.scheme}:// is read only; write to a folder, s3://, gs:// or az://"
        )


def _settled(error: Exception) -> bool:
    """Return true if a GET would not help either: the file does not exist, or there was no answer at all."""
    return any(
        kind in str(error) for kind in ("status code: 404", "kind: Connect", "kind: Timeout", "following redirect")
    )
