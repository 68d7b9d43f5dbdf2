"""Local copies of sources that are in a bucket: under the system's temporary folder, as long as they are needed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from regen_dist.data.making.parts import Part
from regen_dist.data.making.probing import Origin
from regen_dist.data.making.sources import Source
from regen_dist.data.objects.store import free_bytes
from regen_dist.errors import DiskFull


class Copies:
    """Where the sources of parts are read.

    Args:
        folder: for copies; None when there is nothing to copy.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def origins(self, part: Part) -> list[Origin]:
        """For each source of a part: where it is, and where it is read."""
        return [self._origin(part, number) for number in range(len(part.sources))]

    def make_room(self, part: Part) -> None:
        """DiskFull when the sources of a part do not fit beside what is there."""
        needed = sum(source.size for source in part.sources if source.local is None)
        if self._folder is None or not needed:
            return
        free = free_bytes(self._folder)
        if needed > free:
            raise DiskFull(
                f"{self._folder}: the sources of {part.stem} take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                "make room, or set TMPDIR to a folder on another disk, or build with a smaller --part-gb"
            )
        self._of(part).mkdir(exist_ok=True)

    def remove(self, part: Part) -> None:
        """Remove the copies of a part's sources."""
        if self._folder is not None:
            shutil.rmtree(self._of(part), ignore_errors=True)

    def _of(self, part: Part) -> Path:
        assert self._folder is not None, "there is a folder where something is copied"
        return self._folder / part.stem

    def _origin(self, part: Part, number: int) -> Origin:
        source = part.sources[number]
        path = source.local or self._of(part) / f"{number:06d}{source.suffix}"
        return Origin(source.folder, source.file, source.text, path)


def elsewhere(source: Source) -> Origin:
    """A source that is read without keeping a copy."""
    return Origin(source.folder, source.file, source.text, source.local or Path(os.devnull) / "none")


@contextmanager
def local_copies(sources: Sequence[Source]) -> Iterator[Copies]:
    """A folder for copies, removed at the end; those that killed builds left are removed at the start."""
    if all(source.local is not None for source in sources):
        yield Copies(None)
        return
    root = Path(tempfile.gettempdir()) / f"regen-sources-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    with _locked(root):
        for left in root.iterdir():
            _remove_unless_used(left)
        folder = Path(tempfile.mkdtemp(dir=root))
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        yield Copies(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unless_used(folder: Path) -> None:
    """A build holds a lock on its folder; the system drops it with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
