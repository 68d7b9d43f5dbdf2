"""Bringing a cluster's daemons up, each when what it needs is there."""

from __future__ import annotations

import os
import pwd
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launcher.slurm_loopback.configuration import Design, hosts
from launcher.slurm_loopback.daemons import Daemons, answers, can_isolate, free_ports, listens, search_path
from launcher.slurm_loopback.folder import SLURM_CONF, write
from regen_dist.errors import BackendError

START_S = 90.0  # it needs 3 s on an idle machine
_ATTEMPTS = 3  # a port that was free may be taken before a daemon binds it
_MAX_FIRST_JOB_ID = 60_000_000  # Slurm counts to 67 million


def start(folder: Path, *, nodes: int, cpus: int, gpus: int, accounting: bool, grace_s: int) -> tuple[Design, Daemons]:
    """Write a cluster's files and start its daemons; with BackendError (or any other) nothing of it runs."""
    for attempt in range(1, _ATTEMPTS + 1):
        design = Design(
            folder=folder,
            host=socket.gethostname().partition(".")[0],
            user=_user(),
            nodes=nodes,
            cpus=cpus,
            gpus=gpus,
            accounting=accounting,
            grace_s=grace_s,
            ports=free_ports(["slurmctld", "slurmdbd", *(f"node{number}" for number in range(1, nodes + 1))]),
            first_job_id=1000 + secrets.randbelow(_MAX_FIRST_JOB_ID),
        )
        write(design)
        daemons = Daemons(folder / "log", _environment(design), own_hosts(design))
        try:
            _start_all(design, daemons, time.monotonic() + START_S)
        except BaseException as error:  # Ctrl-C while it starts, too
            daemons.end()
            port_taken = isinstance(error, BackendError) and "in use" in str(error)
            if not port_taken or attempt == _ATTEMPTS:
                raise
        else:
            return design, daemons
    raise AssertionError("the last attempt returns or raises")


def start_node(daemons: Daemons, name: str) -> None:
    """Start a node's slurmd, on a host of that name."""
    daemons.start(name, ["slurmd", "-D", "-N", name], alias=name)


def _start_all(design: Design, daemons: Daemons, deadline: float) -> None:
    def wait(name: str, what: str, ready: Callable[[], bool]) -> None:
        daemons.wait_for(name, what, ready, deadline)

    daemons.start("munged", _munged(design), link=design.folder if design.folder.is_symlink() else None)
    if design.accounting:
        daemons.start("mariadbd", _mariadbd(design))
    wait("munged", "did not make its socket", lambda: answers(design.munge))
    if design.accounting:
        wait("mariadbd", "did not make its socket", lambda: answers(design.database))
        daemons.start("slurmdbd", ["slurmdbd", "-D"])
        wait("slurmdbd", "did not listen", lambda: listens(design.ports["slurmdbd"]))
    daemons.start("slurmctld", ["slurmctld", "-D"])
    wait("slurmctld", "did not listen", lambda: listens(design.ports["slurmctld"]))
    for name in design.names:
        start_node(daemons, name)
    for name in design.names:
        wait(name, "did not become idle", lambda: name in _idle(daemons))  # noqa: B023 - called before the next name


def _idle(daemons: Daemons) -> list[str]:
    """Names of the nodes that the controller would give work to; none while it does not answer."""
    command = ["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"]
    asked = subprocess.run(command, env=dict(daemons.environment), capture_output=True, check=False)
    return asked.stdout.decode().split()


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise BackendError(
            f"user {os.getuid()} has no name, and Slurm wants one; add the user to /etc/passwd"
        ) from None


def _environment(design: Design) -> dict[str, str]:
    return {
        "PATH": search_path(os.environ.get("PATH")),
        "HOME": str(design.folder),
        "SLURM_CONF": str(design.folder / SLURM_CONF),
        "MYSQL_UNIX_PORT": str(design.database),
    }


def own_hosts(design: Design) -> Path | None:
    """A file that stands in for /etc/hosts; None where only the machine's own can be had, and it will do."""
    path = design.folder / "etc" / "hosts"
    path.write_text(hosts(design, Path("/etc/hosts").read_text()))
    if can_isolate(path):
        return path
    wanted = [design.host, *design.names]
    if all(_is_loopback(name) for name in wanted):
        return None
    raise BackendError(
        "this machine lets no process have host names of its own (unshare: neither root's right nor a user namespace); "
        f"add a line `127.0.0.1 {' '.join(wanted)}` to the top of /etc/hosts, or start it as root"
    )


def _is_loopback(name: str) -> bool:
    try:
        return socket.gethostbyname(name) == "127.0.0.1"
    except OSError:
        return False


def _munged(design: Design) -> list[str | Path]:
    run = design.folder / "run"
    return [
        "munged",
        "--foreground",
        "--force",  # whoever may write to the folders above ours is not our concern
        f"--socket={design.munge}",
        f"--key-file={run / 'munge.key'}",
        f"--pid-file={run / 'munged.pid'}",
        f"--seed-file={run / 'munged.seed'}",
    ]


def _mariadbd(design: Design) -> list[str | Path]:
    # Without the system tables of mariadb-install-db, which take longer than all the rest: whoever reaches the socket,
    # in a folder that is its owner's alone, may do everything; and the data need not outlive a power cut.
    return [
        "mariadbd",
        "--no-defaults",
        f"--datadir={design.folder / 'database'}",
        f"--socket={design.database}",
        f"--pid-file={design.folder / 'run' / 'mariadbd.pid'}",
        *(["--user=root"] if os.getuid() == 0 else []),
        "--skip-networking",
        "--skip-grant-tables",
        "--innodb-buffer-pool-size=64M",
        "--innodb-log-file-size=16M",
        "--innodb-lock-wait-timeout=900",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-flush-method=nosync",
        "--innodb-doublewrite=0",
        "--innodb-file-per-table=0",
    ]
