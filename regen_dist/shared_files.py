"""Files and folders that several processes share: temporary names and what killed writers left under them, bringing
data to the disk, and locks.

A writer makes a file or a folder under a temporary name beside its target, and renames it: readers see it whole or not
at all. The name ends in the process's id, by which a later command knows what a killed one has left.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import IO

from regen_dist.errors import ConfigError

TEMPORARY = re.compile(r"^\..+\.(\d+)\.tmp$")  # .NAME.RANDOM.PROCESS.tmp
IDLE_S = 3600.0  # idle for so long, a temporary file of another machine has no writer any more
_LONGEST_REPEATED = 150  # bytes of a name that others repeat; most file systems allow 255 for the whole name


@cache
def boot_id() -> str:
    """Return an identifier of this machine's current start; empty if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def short_name(name: str) -> str:
    """Return a name to build longer file names from, such as temporary ones: the same, or a digest of a long one."""
    data = os.fsencode(name)
    return name if len(data) <= _LONGEST_REPEATED else hashlib.sha256(data).hexdigest()


def temporary_beside(path: Path) -> Path:
    """Return a new temporary path in the folder of `path`; `remove_leftovers` removes what is left there."""
    # Random: containers on several machines may write the same name at once, with the same process id.
    return path.with_name(f".{short_name(path.name)}.{secrets.token_hex(4)}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, *, idle_s: float = 0.0) -> list[str]:
    """Remove the temporary files and folders (as of `temporary_beside`) that killed processes left in a folder: those
    of none that runs on this machine, and that were idle for `idle_s` seconds (for writers on other machines). Returns
    their names."""
    left = []
    for path in sorted(folder.glob(".*.tmp")):
        writer = TEMPORARY.match(path.name)
        if writer is None or _runs(int(writer[1])):
            continue
        try:
            if time.time() - path.stat().st_mtime >= idle_s:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                left.append(path.name)
        except OSError:  # somebody else has removed it, or owns it
            continue
    return left


def _runs(process: int) -> bool:
    """Return true if another process on this machine has this id."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sync(path: Path) -> None:
    """Ask the system to bring a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_alone(path: Path, remedy: str) -> IO[str]:
    """Lock a file, and with it its folder, for one process at a time. The lock ends when the returned file is closed,
    or with the process. Where the disk has no file locks, a note says so, and nothing is locked.

    Args:
        path: the lock's file; its folder is created if needed.
        remedy: the end of the error's sentence.

    Raises:
        ConfigError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            with lock:
                lock.seek(0)
                raise ConfigError(f"{path.parent} is in use by {lock.read().strip()}; {remedy}") from None
        print(
            f"note: {path.parent} supports no locks ({error.strerror}); let no other command work on it",
            file=sys.stderr,
        )
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    lock.flush()
    return lock
