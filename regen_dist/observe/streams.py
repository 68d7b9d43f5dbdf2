"""Standard streams that outlive their disk: a log on a full disk loses lines, and no run ends of it."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Lossy(io.FileIO):
    """A file whose bytes are dropped while its disk refuses them. A pipe that nobody reads still tells so."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError:
            return memoryview(data).nbytes


def shield_streams() -> None:
    """Make stdout and stderr of this process lossy. Call it once, at the start of a process that shall last."""
    sys.stdout, sys.stderr = _shielded(sys.stdout), _shielded(sys.stderr)


def _shielded(stream: TextIO) -> TextIO:
    """The same stream above a lossy file; as it is where it does not stand on a descriptor of its own."""
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(getattr(stream.buffer, "raw", None), io.FileIO):
        return stream
    stream.flush()
    raw = _Lossy(stream.fileno(), "w", closefd=False)
    shielded = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream is sys.stderr,
        write_through=stream.write_through,
    )
    return cast("TextIO", shielded)


# Warnings for the user: one line each on stderr.


def warn(text: str) -> None:
    """Print a warning on stderr at once."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
