"""What the long commands of `regen shards` do when they are asked to stop."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from regen_dist.errors import EXIT_RESUME


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Ctrl-C, and the signal by which a batch system ends a job, end the command at once: files are whole or not
    there, so the same command goes on. Exit code 75."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped. What is finished stays; run the same command again to go on.", file=sys.stderr)
        raise typer.Exit(EXIT_RESUME) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
