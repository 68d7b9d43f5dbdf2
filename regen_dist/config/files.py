"""Small files that must never be seen half-written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8: to a new name in the same folder, synced, then moved over `path`."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write `data`: to a new name in the same folder, synced, then moved over `path`.

    Raises:
        OSError: the disk refuses; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_and_replace(path, data)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # a full disk names no file, or another


def _write_and_replace(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
