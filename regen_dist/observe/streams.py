"""Standard streams that survive a full disk: the log loses lines, but the run does not end; and user warnings."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Lossy(io.FileIO):
    """File that drops bytes while its disk refuses them. A broken pipe still raises."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError:
            return memoryview(data).nbytes


def shield_streams() -> None:
    """Make stdout and stderr of this process lossy. Call it once, at the start of a long-running process."""
    sys.stdout, sys.stderr = _shielded(sys.stdout), _shielded(sys.stderr)


def _shielded(stream: TextIO) -> TextIO:
    """Return the stream on top of a lossy file; unchanged if it has no file descriptor of its own."""
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


def warn(text: str) -> None:
    """Print a warning for the user on stderr, one line, unbuffered."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
