"""Stands in for one machine of the cluster: runs a daemon under a host name of its own, and leaves nothing behind.

It is run by its path (`python -I -S host.py …`) and imports nothing but the standard library, so that it starts in a
few hundredths of a second. What the daemon starts, steps and jobs that detach themselves too, stays among this
process's descendants; when the daemon ends, or this process is told to end, or the one that started it is gone, all of
it is killed.

Where the kernel allows it, the daemon has a mount and a UTS namespace: `/etc/hosts` knows the names of the cluster (all
are 127.0.0.1), and the host name is the node's. Slurm listens on the address of the host name: here, loopback.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWUSER = 0x10000000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_SWEEP_S = 0.01
_WATCHED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LIBC = ctypes.CDLL(None, use_errno=True)


def isolate(hosts: Path, name: str | None) -> None:
    """Give this process and its children their own `/etc/hosts` and host name; OSError where that is not allowed.

    Without root it takes a user namespace in which the user keeps its own id, so that Slurm sees no difference.
    """
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_CLONE_NEWNS | _CLONE_NEWUTS):
        _check(_LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWUTS))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _check(_LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _check(_LIBC.mount(os.fsencode(hosts), b"/etc/hosts", None, _MS_BIND, None))
    if name:
        socket.sethostname(name)


def keep(command: list[str]) -> int:
    """Run a program until it ends or this process is told to end; then kill it and all that it left behind.

    Returns:
        Its exit code; 128+n where signal n ended it; 0 when this process was told to end.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_begin_child(os.getpid()))
    try:
        while signal.sigwait(_WATCHED) == signal.SIGCHLD:
            ended = _reap()  # orphans of its steps come to this process too
            if process.pid in ended:
                return ended[process.pid]
        return 0
    finally:
        while left := _descendants(os.getpid()):
            for each in left:
                _kill(each)
            _reap()
            time.sleep(_SWEEP_S)


def _descendants(process: int) -> list[int]:
    """Every process under this one that is not merely waiting to be reaped by another."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state not in "ZX" or int(parent) == process:
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found: list[int] = []
    waiting = [process]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:  # it ended meanwhile
        return


def _reap() -> dict[int, int]:
    """The exit codes of the children that have ended by now."""
    ended: dict[int, int] = {}
    try:
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(child[1])
            ended[child[0]] = code if code >= 0 else 128 - code
    except ChildProcessError:  # there are no more
        pass
    return ended


def _begin_child(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _end_with(parent, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    return prepare


def _end_with(parent: int, number: int) -> None:
    """Ask the kernel to send this process a signal when its parent is gone."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _check(returned: int) -> None:
    if returned:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> int:
    """Entry point. `--check` only tells, by its exit code, whether names of its own can be had; `--link` is a link in a
    folder of its own, which is removed when the process that made it is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--hosts", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--link", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("command", nargs="*")
    asked = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # from here on they are waited for
    _end_with(asked.parent, signal.SIGTERM)
    try:
        _check(_LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        if asked.hosts:
            isolate(asked.hosts, asked.name)
    except OSError as error:
        print(f"host names of its own cannot be had: {error}", file=sys.stderr)
        return 1
    code = 0 if asked.check else keep(asked.command)
    if asked.link and os.getppid() != asked.parent:  # nobody else is left to do it
        asked.link.unlink(missing_ok=True)
        asked.link.parent.rmdir()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
