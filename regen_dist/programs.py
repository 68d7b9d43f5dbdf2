"""Start of Python processes: never with the current folder on their path.

Otherwise `python -m` and the worker processes of multiprocessing look for modules in the user's current folder before
anywhere else: a `random.py` or a `tools/` there would be executed in place of the real one.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

SAFE_PATH = "PYTHONSAFEPATH"
REGEN = "tools.cli"  # the module behind the command `regen`: named here alone
STOP_CHECKED = "REGEN_STOP_CHECKED"  # set by our launcher, which starts no training whose folder has a file STOP
GPUS_PER_NODE = "REGEN_GPUS_PER_NODE"  # set by our launcher: the number of GPUs that it requested on each node


def python(*arguments: str) -> list[str]:
    """A command that runs this Python in its safe-path mode."""
    return [sys.executable, "-P", *arguments]


def regen(*arguments: str) -> list[str]:
    """A command that runs `regen` in this Python."""
    return python("-m", REGEN, *arguments)


def with_safe_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process whose own children, workers of pools among them, import safely too. An empty entry
    of PYTHONPATH, as `$PYTHONPATH:more` leaves, means the current folder as well, and is removed."""
    safe = {**environment, SAFE_PATH: "1"}
    if (path := safe.pop("PYTHONPATH", "")) and (kept := [each for each in path.split(os.pathsep) if each]):
        safe["PYTHONPATH"] = os.pathsep.join(kept)
    return safe


def print_any_text() -> None:
    """Let stdout show what its encoding lacks as `\\u2026`, as stderr does: names that are not UTF-8, and signs such as
    "…" under a locale without them. Otherwise printing these raises UnicodeEncodeError."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def flushing_stdout() -> Iterator[None]:
    """Flush stdout at the end of the block, where what refuses it can still be reported. At its own end Python would
    show "Exception ignored" and exit with 120. An error of the block comes first.

    Raises:
        OSError: the disk under stdout refuses.
        SystemExit: nobody reads the pipe any more (exit code 1, as where a command notices earlier).
    """
    try:
        yield
    finally:
        block = sys.exception()
        try:
            if sys.stdout is not None:  # closed from the start
                sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what it still holds
            if block is None or (isinstance(block, SystemExit) and not block.code):
                if isinstance(error, BrokenPipeError):
                    raise SystemExit(1) from None
                raise


def start_safely(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make all processes that this one starts from now on import safely."""
    safe = with_safe_path(environment)
    for name in (SAFE_PATH, "PYTHONPATH"):
        if name in safe:
            environment[name] = safe[name]
        else:
            environment.pop(name, None)
