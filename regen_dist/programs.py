"""How Python is started here: never with the current folder on its path; and how commands end.

Without the safe path, `python -m` and the worker processes of multiprocessing look for modules in the folder where the
user happens to be, before anywhere else: a `random.py` or a `tools/` there would be executed in the place of the real
one.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from regen_dist.errors import ConfigError, RegenError

SAFE_PATH = "PYTHONSAFEPATH"
REGEN = "tools.cli"  # the module behind the command `regen`: named here alone
GPUS_PER_NODE = "REGEN_GPUS_PER_NODE"  # by which our launcher tells how many GPUs it asked for on each node


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


def start_safely(environment: MutableMapping[str, str] = os.environ) -> None:
    """See to it that all that this process starts from now on imports safely."""
    safe = with_safe_path(environment)
    for name in (SAFE_PATH, "PYTHONPATH"):
        if name in safe:
            environment[name] = safe[name]
        else:
            environment.pop(name, None)


@contextmanager
def errors_in_one_line(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """End a command with one message on stderr and an exit code: that of a RegenError, or 2 where a file or folder
    refuses. Any other error keeps its traceback, and with REGEN_DEBUG=1 all do."""
    try:
        yield
    except (RegenError, OSError) as error:
        told = str(error) if isinstance(error, RegenError) else refusal(error)
        if told is None or environment.get("REGEN_DEBUG") == "1":
            raise
        print(f"error: {told}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", ConfigError.exit_code)) from None


def refusal(error: OSError) -> str | None:
    """A disk's refusal in words, and how to mend it; None where the error is of another kind."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return f"{where}{error.strerror}; {remedy}"


_ROOM = "make room on that disk, and run the same again"
_ELSEWHERE = "check its owner, its mode and how its disk is mounted, or name another place"
_NAME = "name another place"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _ELSEWHERE),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), _NAME),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO), "does that disk answer?"),
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}
