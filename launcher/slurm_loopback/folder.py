"""The folder that a cluster runs in: kept for one at a time, reached by a path that Slurm takes, written afresh."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.slurm_loopback.configuration import Design, files
from regen_dist.errors import BackendError

SLURM_CONF = "etc/slurm.conf"
_FOLDERS = ("etc", "log", "run", "state", "spool", "dev", "database")
_LONGEST_PATH = 55  # a Unix socket has 107 bytes, and the sockets of steps lie deep
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+-]+")  # others mean something in Slurm's files
_KEY_BYTES = 1024


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder for one cluster; BackendError when it holds something else or another cluster runs in it."""
    try:
        if folder.exists() and not (folder / SLURM_CONF).exists() and any(folder.iterdir()):
            raise BackendError(f"{folder} holds other things than a Slurm cluster; choose a new folder")
        (folder / "etc").mkdir(parents=True, exist_ok=True)
        (folder / SLURM_CONF).touch()  # from now on it is ours, even if the start fails
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise BackendError(f"Slurm cannot use the folder {folder}: {error}; choose another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackendError(f"a Slurm cluster runs in {folder} already; choose another folder or end it") from None
        yield


@contextmanager
def short_path(folder: Path) -> Iterator[Path]:
    """The folder by a path that Slurm's files and Unix sockets take: its own, or a link in /tmp."""
    if len(os.fsencode(folder)) <= _LONGEST_PATH and _PLAIN_PATH.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as made:
        link = Path(made) / "c"
        link.symlink_to(folder)
        yield link


def write(design: Design) -> None:
    """Make everything that the daemons find at their start; nothing of an earlier cluster is left."""
    for name in _FOLDERS:
        if (design.folder / name).exists():
            shutil.rmtree(design.folder / name)
        (design.folder / name).mkdir(mode=0o700)
    for name in design.names:
        (design.folder / "spool" / name).mkdir()
    for name, text in files(design).items():
        _write_private(design.folder / "etc" / name, text.encode())
    _write_private(design.folder / "run" / "munge.key", secrets.token_bytes(_KEY_BYTES))
    for number in range(design.gpus):
        _make_device(design.folder / "dev" / f"gpu{number}")


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _make_device(path: Path) -> None:
    """A twin of /dev/null where that is allowed; Slurm takes a plain file too, with a complaint in its log."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        path.touch()
