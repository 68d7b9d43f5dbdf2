"""A real Slurm cluster on this machine for tests, demonstrations and experiments: several nodes, all on loopback.

`start_slurm` runs it for the duration of a `with` block, `python -m tools.local_services.slurm FOLDER` until Ctrl-C.
It needs Debian's Slurm packages, but neither systemd nor root.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from regen_dist.errors import BackendError, RegenError
from tools.local_services import slurm_host

# Configuration files of the cluster: pure functions of its design.

MEMORY_MB = 4000  # per node, as declared; not enforced
DATABASE = "slurm_acct_db"


@dataclass(frozen=True)
class Design:
    """Layout and ports of a cluster.

    Args:
        folder: all its files; the path must be short enough for Unix sockets.
        host: name of the machine that it runs on.
        user: owner, who may submit to it.
        nodes: number of nodes, named node1, node2, ….
        cpus: per node, as declared; nodes share the cores of the machine.
        gpus: per node; device names only.
        accounting: whether slurmdbd stores the data for `sacct`.
        grace_s: seconds between the signal and the end of a preempted job.
        ports: on 127.0.0.1, of "slurmctld", "slurmdbd" and each node.
        first_job_id: random, so that a folder named after a job id is not taken for that of an older cluster's job.
    """

    folder: Path
    host: str
    user: str
    nodes: int
    cpus: int
    gpus: int
    accounting: bool
    grace_s: int
    ports: Mapping[str, int]
    first_job_id: int

    @property
    def names(self) -> list[str]:
        """Names of the nodes."""
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def munge(self) -> Path:
        """Socket of munged, the daemon that authenticates users."""
        return self.folder / "run" / "munge.sock"

    @property
    def database(self) -> Path:
        """Socket of MariaDB, its only listening address."""
        return self.folder / "run" / "database.sock"


def slurm_files(design: Design) -> dict[str, str]:
    """Return every configuration file by name."""
    written = {"slurm.conf": slurm_conf(design), "gres.conf": gres_conf(design)}
    return written | {"slurmdbd.conf": slurmdbd_conf(design)} if design.accounting else written


def slurm_conf(design: Design) -> str:
    """Return the configuration of all daemons and clients of the cluster."""
    folder = design.folder
    gres = f" Gres=gpu:{design.gpus}" if design.gpus else ""
    return "\n".join(
        [
            "ClusterName=loopback",
            f"SlurmctldHost={design.host}(127.0.0.1)",
            f"SlurmctldPort={design.ports['slurmctld']}",
            f"SlurmUser={design.user}",
            f"SlurmdUser={design.user}",
            # Slurm holds a requeued job for the lifetime of a credential, 120 s by default
            f"AuthInfo=socket={design.munge},cred_expire=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/run/slurmctld.pid",
            f"SlurmdPidFile={folder}/run/%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld.log",
            f"SlurmdLogFile={folder}/log/%n.log",
            "SlurmctldDebug=verbose",
            "SlurmdDebug=verbose",
            # Daemons and clients listen only on the address of the host name, which is loopback
            "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
            # No cgroups, no privileges, no hardware detection
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/linux",
            "JobAcctGatherFrequency=5",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "PropagateResourceLimits=NONE",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            # Decisions within a second, for tests
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0",
            "KillWait=3",
            "SlurmdTimeout=15",  # a node that does not answer is marked down and its jobs are requeued
            "CompleteWait=0",
            "InactiveLimit=0",
            "MinJobAge=3600",  # `scontrol show job` and `squeue --states all` still list ended jobs
            "MailProg=/bin/true",
            # A job of a higher tier preempts one of a lower, which first gets its requested signal and is then requeued
            "JobRequeue=1",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SlurmctldParameters=preempt_send_user_signal",
            f"FirstJobId={design.first_job_id}",
            *_accounting(design),
            *(["GresTypes=gpu"] if design.gpus else []),
            *(
                f"NodeName={name} NodeAddr=127.0.0.1 Port={design.ports[name]} CPUs={design.cpus}"
                f" RealMemory={MEMORY_MB}{gres}"
                for name in design.names
            ),
            f"PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={design.grace_s}",
            "PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE PriorityTier=10",
            "",
        ]
    )


def _accounting(design: Design) -> list[str]:
    if not design.accounting:
        return ["AccountingStorageType=accounting_storage/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={design.ports['slurmdbd']}",
        f"AccountingStoragePass={design.munge}",
        "AccountingStorageTRES=gres/gpu",
    ]


def slurmdbd_conf(design: Design) -> str:
    """Return slurmdbd's configuration. It connects to the database through the socket in MYSQL_UNIX_PORT."""
    return "\n".join(
        [
            f"AuthInfo=socket={design.munge}",
            f"DbdHost={design.host}",
            "DbdAddr=127.0.0.1",
            f"DbdPort={design.ports['slurmdbd']}",
            f"SlurmUser={design.user}",
            f"PidFile={design.folder}/run/slurmdbd.pid",
            f"LogFile={design.folder}/log/slurmdbd.log",
            "CommunicationParameters=NoInAddrAny",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=slurm",
            f"StorageLoc={DATABASE}",
            "",
        ]
    )


def gres_conf(design: Design) -> str:
    """Return the GPUs of a node. Slurm needs a file for each: a count alone registers none."""
    if not design.gpus:
        return ""
    numbers = f"[0-{design.gpus - 1}]" if design.gpus > 1 else "0"
    return f"Name=gpu File={design.folder}/dev/gpu{numbers}\n"


def hosts(design: Design, machine: str) -> str:
    """Return the cluster's `/etc/hosts`: the machine's, with the cluster's names resolving to loopback."""
    ours = {design.host, *design.names}
    kept = [line for line in machine.splitlines() if not ours & set(line.partition("#")[0].split()[1:])]
    return "\n".join([f"127.0.0.1 localhost {' '.join(sorted(ours))}", *kept, ""])


# Cluster folder: locked for one cluster at a time, reached through a path that Slurm accepts, written anew.

SLURM_CONF = "etc/slurm.conf"
_FOLDERS = ("etc", "log", "run", "state", "spool", "dev", "database")
_LONGEST_PATH = 55  # a Unix socket path has 107 bytes, and the sockets of steps are deeply nested
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+-]+")  # other characters are special in Slurm's files
_KEY_BYTES = 1024


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder for one cluster; BackendError if it contains something else or another cluster runs in it."""
    try:
        if folder.exists() and not (folder / SLURM_CONF).exists() and any(folder.iterdir()):
            raise BackendError(f"{folder} holds other things than a Slurm cluster; choose a new folder")
        (folder / "etc").mkdir(parents=True, exist_ok=True)
        (folder / SLURM_CONF).touch()  # marks the folder as a cluster's, even if the start fails
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
    """Yield a path of the folder that Slurm's files and Unix sockets accept: its own, or a link in /tmp."""
    if len(os.fsencode(folder)) <= _LONGEST_PATH and _PLAIN_PATH.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as made:
        link = Path(made) / "c"
        link.symlink_to(folder)
        yield link


def write_file(design: Design) -> None:
    """Create everything that the daemons need at their start; remove everything of an earlier cluster."""
    for name in _FOLDERS:
        if (design.folder / name).exists():
            shutil.rmtree(design.folder / name)
        (design.folder / name).mkdir(mode=0o700)
    for name in design.names:
        (design.folder / "spool" / name).mkdir()
    for name, text in slurm_files(design).items():
        _write_private(design.folder / "etc" / name, text.encode())
    _write_private(design.folder / "run" / "munge.key", secrets.token_bytes(_KEY_BYTES))
    for number in range(design.gpus):
        _make_device(design.folder / "dev" / f"gpu{number}")


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _make_device(path: Path) -> None:
    """Create a device like /dev/null if permitted; Slurm also accepts a plain file, with a warning in its log."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        path.touch()


__all__ = ["SlurmCluster", "missing_packages", "start_slurm"]


# Daemons of a cluster. Each runs under `slurm_host`, which leaves no process behind.

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
# Settings of another cluster, inside whose job this process may run
_FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")
_LISTENING = ("srun", "salloc")  # clients to which nodes connect back


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster with partitions `main` (preempted, by requeue) and `high` (preempts)."""

    design: Design
    daemons: Daemons

    @property
    def nodes(self) -> Sequence[str]:
        """Names of the nodes. They resolve inside jobs."""
        return self.design.names

    def environment(self) -> dict[str, str]:
        """Return the variables that make any Slurm client, and Submitit, use this cluster."""
        return {
            "SLURM_CONF": str(self.design.folder / SLURM_CONF),
            "PATH": search_path(os.environ.get("PATH")),
        }

    def run(
        self,
        program: str,
        *arguments: str | Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = RUN_S,
    ) -> str:
        """Run a client of this cluster and return its output.

        Args:
            program: `squeue`, `sbatch`, `scontrol`, `sacct`, ….
            arguments: passed on literally.
            cwd: working directory; with `sbatch` also that of the job.
            environment: variables in addition to those of this process. Slurm variables of this process, as inside
                another cluster's job, are not passed on.
            timeout_s: timeout in seconds.

        Raises:
            BackendError: it failed (with its output), or timed out.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        command = [program, *map(str, arguments)]
        if program in _LISTENING and self.daemons.hosts:  # listens on the address of the host name
            command = host_command(["--hosts", str(self.daemons.hosts), "--", *command])
        try:
            ended = subprocess.run(
                command,
                cwd=cwd,
                env={**inherited, **self.environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BackendError(f"{program} did not answer within {timeout_s:.0f} s") from None
        if ended.returncode:
            said = ended.stderr.strip() or ended.stdout.strip() or "nothing"
            raise BackendError(f"{program} ended with exit code {ended.returncode} and said: {said}")
        return ended.stdout.strip()

    def end_node(self, name: str) -> None:
        """Simulate a power failure of a node: its daemon, steps and jobs are killed without notifying the
        controller."""
        self.daemons.end([name])

    def start_node(self, name: str) -> None:
        """Start a node, also again after `end_node`; it accepts jobs once it is idle."""
        start_node(self.daemons, name)


@contextmanager
def start_slurm(
    folder: Path,
    *,
    nodes: int = 2,
    cpus: int = 4,
    gpus: int = 2,
    accounting: bool = True,
    grace_s: int = 10,
) -> Iterator[SlurmCluster]:
    """Run a Slurm cluster on loopback for the duration of a `with` block; it never outlives the thread that started it.

    Jobs and steps that are still running at the end are killed. A cluster starts empty, with a random first job id; its
    logs are in `folder/log`.

    Args:
        folder: new, or used by such a cluster before. If its path is too long for sockets (or has
            characters that Slurm's files do not accept), a link in /tmp is used.
        nodes: number of nodes, named node1, node2, ….
        cpus: per node, as declared.
        gpus: fake GPUs per node, as GRES: CUDA_VISIBLE_DEVICES is set, but there is no device.
        accounting: with slurmdbd and MariaDB, for `sacct`.
        grace_s: seconds between the signal and the end of a preempted job.

    Raises:
        BackendError: packages are missing, the folder is in use or contains something else, or a daemon did not start
            (with the end of its log).
    """
    if missing := missing_packages(accounting=accounting):
        command = f"sudo apt-get install --no-install-recommends {' '.join(missing)}"
        raise BackendError(
            f"Slurm is not installed: {', '.join(missing)} missing; on Debian and Ubuntu run `{command}`"
        )
    folder = folder.resolve()
    with held(folder), short_path(folder) as short:
        design, daemons = start_daemons(
            short, nodes=nodes, cpus=cpus, gpus=gpus, accounting=accounting, grace_s=grace_s
        )
        try:
            yield SlurmCluster(design, daemons)
        finally:
            daemons.end()


# `python -m tools.local_services.slurm FOLDER`: a Slurm cluster on this machine until Ctrl-C.

_LOOK_S = 0.5  # polling interval of the daemons


def run(
    folder: Annotated[Path, typer.Argument(help="New folder for all files of the cluster.")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 2,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs per node, as declared.")] = 4,
    gpus: Annotated[int, typer.Option(min=0, help="Fake GPUs per node.")] = 2,
    accounting: Annotated[bool, typer.Option(help="With slurmdbd and MariaDB, for sacct.")] = True,
    grace: Annotated[int, typer.Option(min=0, help="Seconds between the signal and the end of a preempted job.")] = 10,
) -> None:
    """Run a Slurm cluster on loopback until Ctrl-C; FOLDER/env.sh makes a shell its client.

    Example: python -m tools.local_services.slurm /tmp/slurm --nodes 2 --gpus 2
    """
    with start_slurm(folder, nodes=nodes, cpus=cpus, gpus=gpus, accounting=accounting, grace_s=grace) as cluster:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
        lines = environment_lines(cluster)
        (folder / "env.sh").write_text(lines)
        print(f"Slurm runs: {', '.join(cluster.nodes)}; partitions main and high. In another terminal:", flush=True)
        print(f". {shlex.quote(str(folder.resolve() / 'env.sh'))}   # it is:\n\n{lines}\nCtrl-C ends it.", flush=True)
        try:
            _watch(cluster)
        except KeyboardInterrupt:
            print("ending Slurm and its jobs", file=sys.stderr)


def environment_lines(cluster: SlurmCluster) -> str:
    """Return shell lines that make a shell a client of the cluster."""
    configuration = shlex.quote(cluster.environment()["SLURM_CONF"])
    return f'export SLURM_CONF={configuration}\nexport PATH="$PATH:{":".join(SYSTEM_FOLDERS)}"\n'


def _watch(cluster: SlurmCluster) -> None:
    while True:
        for name, process in cluster.daemons.running.items():
            if process.poll() is not None:
                raise BackendError(f"{name} ended; {cluster.daemons.tail(name)}")
        time.sleep(_LOOK_S)


def main() -> None:
    """Entry point: a RegenError becomes one message on stderr and its exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(run)
    try:
        app(prog_name="python -m tools.local_services.slurm")
    except RegenError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
