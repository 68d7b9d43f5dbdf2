"""Daemons of the loopback cluster: their commands, their start, each when its dependencies are ready, and their end."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from regen_dist.errors import BackendError
from tools.local_services import slurm_host
from tools.local_services.slurm_files import SLURM_CONF, Design, hosts, write_file

GRACE_S = 20.0  # takes 0.1 s; longer on a loaded machine
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # often missing from a user's PATH
PACKAGES = {  # Debian packages by program
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
}
_ACCOUNTING = ("slurmdbd", "mariadbd")
_LISTENS = "0A"  # socket state in /proc/net/tcp
_POLL_S = 0.02
_TAIL_LINES = 8


def search_path(path: str | None) -> str:
    """Return PATH with the folders of system programs."""
    return os.pathsep.join([path or os.defpath, *SYSTEM_FOLDERS])


def missing_packages(*, accounting: bool) -> list[str]:
    """Return the missing Debian packages that a cluster needs, in order of installation."""
    path = search_path(os.environ.get("PATH"))
    wanted = [program for program in PACKAGES if accounting or program not in _ACCOUNTING]
    return list(dict.fromkeys(PACKAGES[program] for program in wanted if shutil.which(program, path=path) is None))


@dataclass
class Daemons:
    """Running daemons of one cluster, by name, and their output."""

    logs: Path
    environment: Mapping[str, str]
    hosts: Path | None
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(
        self, name: str, command: Sequence[str | Path], *, alias: str | None = None, link: Path | None = None
    ) -> None:
        """Run a daemon in the foreground on a host called `alias`; its output goes to NAME.out.

        The host removes `link` if this process is killed.
        """
        options = ["--hosts", str(self.hosts), *(["--name", alias] if alias else [])] if self.hosts else []
        options += ["--link", str(link)] if link else []
        with (self.logs / f"{name}.out").open("ab") as log:
            self.running[name] = subprocess.Popen(
                host_command([*options, "--", *map(str, command)]),
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to this process, which ends the daemon
            )

    def wait_for(self, name: str, what: str, ready: Callable[[], bool], deadline: float) -> None:
        """Block until `ready`; BackendError with the end of the log if the daemon ends or the deadline passes."""
        while not ready():
            code = self.running[name].poll()
            if code is not None:
                raise BackendError(f"{name} ended with exit code {code} while it started; {self.tail(name)}")
            if time.monotonic() > deadline:
                raise BackendError(f"{name} runs, but {what} in time; {self.tail(name)}")
            time.sleep(_POLL_S)

    def tail(self, name: str) -> str:
        """Return the end of a daemon's output, for a message."""
        path = self.logs / f"{name}.out"
        lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:] or ["(nothing)"]
        return "\n".join([f"{path} ends with:", *(f"  | {line}" for line in lines)])

    def end(self, names: Iterable[str] | None = None) -> None:
        """End daemons (all by default) immediately, with the steps and jobs that run under them."""
        ending = [self.running.pop(name) for name in list(self.running if names is None else names)]
        for process in ending:
            process.terminate()
        for process in ending:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def can_isolate(hosts: Path) -> bool:
    """Return whether daemons can have their own host names on this machine."""
    check = host_command(["--hosts", str(hosts), "--name", "node1", "--check"])
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


def host_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs `slurm_host` for this process."""
    return [sys.executable, "-I", "-S", slurm_host.__file__, "--parent", str(os.getpid()), *arguments]


def listens(port: int) -> bool:
    """Return whether a process listens on a TCP port; without connecting, so that no log reports the attempt."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(each[3] == _LISTENS and int(each[1].rpartition(":")[2], 16) == port for each in sockets)


def answers(path: Path) -> bool:
    """Return whether a process accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """Return a free port of 127.0.0.1 for each name, all reserved while they are chosen."""
    with ExitStack() as held:
        probes = {name: held.enter_context(socket.create_server(("127.0.0.1", 0))) for name in names}
        return {name: int(probe.getsockname()[1]) for name, probe in probes.items()}


# Start of a cluster's daemons, each when its dependencies are ready.

START_S = 90.0  # takes 3 s on an idle machine
_ATTEMPTS = 3  # a free port may be taken before a daemon binds it
_MAX_FIRST_JOB_ID = 60_000_000  # Slurm counts to 67 million


def start_daemons(
    folder: Path, *, nodes: int, cpus: int, gpus: int, accounting: bool, grace_s: int
) -> tuple[Design, Daemons]:
    """Write a cluster's files and start its daemons; on any error, none of them keeps running."""
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
        write_file(design)
        daemons = Daemons(folder / "log", _environment(design), own_hosts(design))
        try:
            _start_all(design, daemons, time.monotonic() + START_S)
        except BaseException as error:  # also Ctrl-C during the start
            daemons.end()
            port_taken = isinstance(error, BackendError) and "in use" in str(error)
            if not port_taken or attempt == _ATTEMPTS:
                raise
        else:
            return design, daemons
    raise AssertionError("the last attempt returns or raises")


def start_node(daemons: Daemons, name: str) -> None:
    """Start a node's slurmd on a host of that name."""
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
    """Return the names of the idle nodes; none while the controller does not answer."""
    command = ["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"]
    asked = subprocess.run(command, env=dict(daemons.environment), capture_output=True, check=False)
    return asked.stdout.decode().split()


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise BackendError(
            f"user {os.getuid()} has no name, which Slurm requires; add the user to /etc/passwd"
        ) from None


def _environment(design: Design) -> dict[str, str]:
    return {
        "PATH": search_path(os.environ.get("PATH")),
        "HOME": str(design.folder),
        "SLURM_CONF": str(design.folder / SLURM_CONF),
        "MYSQL_UNIX_PORT": str(design.database),
    }


def own_hosts(design: Design) -> Path | None:
    """Return a replacement for /etc/hosts; None if only the machine's own can be used and is sufficient."""
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
        "--force",  # permissions of the parent folders are not checked
        f"--socket={design.munge}",
        f"--key-file={run / 'munge.key'}",
        f"--pid-file={run / 'munged.pid'}",
        f"--seed-file={run / 'munged.seed'}",
    ]


def _mariadbd(design: Design) -> list[str | Path]:
    # Without the system tables of mariadb-install-db, which take longer than everything else: the socket is in a folder
    # that only its owner can access, and the data need not survive a power failure.
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


# `start_slurm`: a cluster for the duration of a `with` block.

RUN_S = 60.0
