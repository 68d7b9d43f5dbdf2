"""Starting and ending the daemons of a cluster. Each runs under a `host`, which leaves nothing of it behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from launcher.slurm_loopback import host
from regen_dist.errors import BackendError

GRACE_S = 20.0  # it needs a tenth of a second; a loaded machine, more
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # a user's PATH often lacks them
PACKAGES = {  # Debian's, by program
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
}
_ACCOUNTING = ("slurmdbd", "mariadbd")
_LISTENS = "0A"  # a state in /proc/net/tcp
_POLL_S = 0.02
_TAIL_LINES = 8


def search_path(path: str | None) -> str:
    """PATH with the folders of system programs."""
    return os.pathsep.join([path or os.defpath, *SYSTEM_FOLDERS])


def missing_packages(*, accounting: bool) -> list[str]:
    """Debian's packages that a cluster needs and that are not here, in the order of installation."""
    path = search_path(os.environ.get("PATH"))
    wanted = [program for program in PACKAGES if accounting or program not in _ACCOUNTING]
    return list(dict.fromkeys(PACKAGES[program] for program in wanted if shutil.which(program, path=path) is None))


@dataclass
class Daemons:
    """What runs of one cluster, by name, and what it said."""

    logs: Path
    environment: Mapping[str, str]
    hosts: Path | None
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(
        self, name: str, command: Sequence[str | Path], *, alias: str | None = None, link: Path | None = None
    ) -> None:
        """Run a daemon in the foreground, on a host called `alias`; its output goes to NAME.out.

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
                start_new_session=True,  # Ctrl-C is for us; we end it
            )

    def wait_for(self, name: str, what: str, ready: Callable[[], bool], deadline: float) -> None:
        """Block until `ready`; BackendError, with the end of the log, when the daemon ends or the deadline passes."""
        while not ready():
            code = self.running[name].poll()
            if code is not None:
                raise BackendError(f"{name} ended with exit code {code} while it started; {self.tail(name)}")
            if time.monotonic() > deadline:
                raise BackendError(f"{name} runs, but {what} in time; {self.tail(name)}")
            time.sleep(_POLL_S)

    def tail(self, name: str) -> str:
        """The end of what a daemon wrote, for a message."""
        path = self.logs / f"{name}.out"
        lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:] or ["(nothing)"]
        return "\n".join([f"{path} ends with:", *(f"  | {line}" for line in lines)])

    def end(self, names: Iterable[str] | None = None) -> None:
        """End daemons (all by default) with the steps and jobs that run under them, at once."""
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
    """Whether daemons may have host names of their own here."""
    check = host_command(["--hosts", str(hosts), "--name", "node1", "--check"])
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


def host_command(arguments: Sequence[str]) -> list[str]:
    """The command that runs `host` for this process."""
    return [sys.executable, "-I", "-S", host.__file__, "--parent", str(os.getpid()), *arguments]


def listens(port: int) -> bool:
    """Whether somebody listens on a TCP port of this machine; nobody is called, so no log complains of the call."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(each[3] == _LISTENS and int(each[1].rpartition(":")[2], 16) == port for each in sockets)


def answers(path: Path) -> bool:
    """Whether somebody accepts on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """A port of 127.0.0.1 for each name, all held while they are drawn."""
    with ExitStack() as held:
        probes = {name: held.enter_context(socket.create_server(("127.0.0.1", 0))) for name in names}
        return {name: int(probe.getsockname()[1]) for name, probe in probes.items()}
