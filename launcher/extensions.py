"""Where DeepSpeed's compiled operators live, and the locks that a killed build leaves there.

torch guards each build folder with a file named `lock`, which its builder keeps open and deletes at the end. A builder
that is killed leaves the file, and every later process waits for it without a word and without an end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

DEFAULT_FOLDER = Path(".cache") / "torch_extensions"
_GRACE_S = 10.0  # younger locks are left alone: their builder may live in another container of this machine
_GRACE_UNKNOWN_S = 1800.0  # where /proc cannot tell who builds, only a lock older than any build is taken for dead


def extensions_folder() -> Path:
    """The folder of compiled operators: TORCH_EXTENSIONS_DIR, or a cache of the project under the current directory."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or DEFAULT_FOLDER).resolve()


def clear_stale_locks(folder: Path, *, grace_s: float = _GRACE_S) -> list[Path]:
    """Delete the locks under `folder` that no process of this machine holds; returns those that were deleted.

    Args:
        folder: root of the compiled operators, one subfolder an operator.
        grace_s: age in seconds below which a lock is never touched.
    """
    held = _files_held_open()
    limit_s = grace_s if held is not None else max(grace_s, _GRACE_UNKNOWN_S)
    stale = [lock for lock in sorted(folder.glob("*/lock")) if _is_stale(lock, held or set(), limit_s)]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _is_stale(lock: Path, held: set[str], limit_s: float) -> bool:
    try:
        age_s = time.time() - lock.stat().st_mtime
    except FileNotFoundError:  # its builder has just finished
        return False
    return age_s >= limit_s and str(lock.resolve()) not in held


def _files_held_open() -> set[str] | None:
    """Paths under a folder of compiled operators that some process has open; None where /proc cannot tell."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return None
    held: set[str] = set()
    for descriptors in processes.glob("[0-9]*/fd"):
        try:
            links = [os.readlink(entry) for entry in os.scandir(descriptors)]
        except OSError:  # the process has ended, or belongs to another user
            continue
        held.update(link for link in links if link.endswith("/lock"))
    return held
