"""One host of the local Slurm cluster: runs a daemon under its own host name and leaves no process behind.

It is run by its path (`python -I -S slurm_host.py …`) and imports only the standard library, so that it starts within
hundredths of a second. Everything the daemon starts, including detached steps and jobs, remains a descendant of this
process; all of it is killed when the daemon ends, when this process is asked to end, or when its parent is gone.

Where the kernel permits it, the daemon has its own mount and UTS namespaces: `/etc/hosts` contains the names of the
cluster (all 127.0.0.1), and the host name is the node's. Slurm listens on the host name's address: here, loopback.
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
    """Give this process and its children their own `/etc/hosts` and host name; OSError if not permitted.

    Without root it uses a user namespace in which the user keeps its id, so that Slurm sees no difference.
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
    """Run a program until it ends or this process is asked to end; then kill it and all its descendants.

    Returns:
        Its exit code; 128+n if signal n ended it; 0 if this process was asked to end.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_begin_child(os.getpid()))
    try:
        while signal.sigwait(_WATCHED) == signal.SIGCHLD:
            ended = _reap()  # also reaps orphans of its steps
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
    """Return every descendant of a process, except zombies that another process reaps."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
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
    except ProcessLookupError:  # it has ended meanwhile
        return


def _reap() -> dict[int, int]:
    """Return the exit codes of the children that have ended."""
    ended: dict[int, int] = {}
    try:
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(child[1])
            ended[child[0]] = code if code >= 0 else 128 - code
    except ChildProcessError:  # no more children
        pass
    return ended


def _begin_child(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _end_with(parent, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    return prepare


def _end_with(parent: int, number: int) -> None:
    """Ask the kernel to signal this process when its parent is gone."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def _check(returned: int) -> None:
    if returned:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> int:
    """Entry point. `--check` only reports by its exit code whether own host names are possible; `--link` is a link in
    its own folder, removed when the process that created it is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--hosts", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--link", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("command", nargs="*")
    asked = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # from here on, signals are waited for
    _end_with(asked.parent, signal.SIGTERM)
    try:
        _check(_LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        if asked.hosts:
            isolate(asked.hosts, asked.name)
    except OSError as error:
        print(f"host names of its own cannot be had: {error}", file=sys.stderr)
        return 1
    code = 0 if asked.check else keep(asked.command)
    if asked.link and os.getppid() != asked.parent:  # no other process is left to remove it
        asked.link.unlink(missing_ok=True)
        asked.link.parent.rmdir()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
