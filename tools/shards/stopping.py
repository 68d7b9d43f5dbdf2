"""What the long commands of `regen shards` do when they are asked to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from regen_dist.errors import EXIT_RESUME

_AGAIN_S = 0.05


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Ctrl-C, and the signal by which a batch system ends a job, end the command at once: files are whole or not
    there, so the same command goes on. Exit code 75."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _heard_in_destructors():
            yield
    except KeyboardInterrupt:
        print("Stopped. What is finished stays; run the same command again to go on.", file=sys.stderr)
        raise typer.Exit(EXIT_RESUME) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _heard_in_destructors() -> Iterator[None]:
    """What a signal raises while an object is being deleted is told of, and lost: the signal is sent again a moment
    later."""
    tell, main = sys.unraisablehook, threading.main_thread().ident or 0
    again: list[threading.Timer] = []

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            tell(lost)
            return
        again.append(threading.Timer(_AGAIN_S, signal.pthread_kill, (main, signal.SIGTERM)))
        again[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = tell
        for timer in again:
            timer.cancel()
            timer.join()
