"""Folders of an encoder that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from regen_dist.errors import CheckpointError


@contextmanager
def made_whole(folder: Path, is_there: Callable[[], bool]) -> Iterator[Path]:
    """A new folder beside `folder` that is renamed to it when the block ends well, and removed when it does not.

    Args:
        folder: not there yet, or empty.
        is_there: whether another process has made the same meanwhile; raises when it holds something else.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            yield made
            made.chmod(0o755)
            for path in (*made.iterdir(), made):
                _sync(path)
            _take_place(made, folder, is_there)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"the text encoder cannot be written to {folder}: {error.strerror or error}") from error


def _take_place(made: Path, folder: Path, is_there: Callable[[], bool]) -> None:
    try:
        os.rename(made, folder)
    except OSError:
        if not is_there():
            raise
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
