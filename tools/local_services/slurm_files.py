"""Files of the loopback cluster: Slurm's configuration, from the cluster's design alone, and the folder for them."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regen_dist.errors import BackendError

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
        cpus: cores per node, as declared; nodes share the cores of the machine.
        gpus: GPUs per node; device names only.
        accounting: true if slurmdbd stores the data for `sacct`.
        grace_s: seconds between the signal and the end of a preempted job.
        ports: ports on 127.0.0.1 of "slurmctld", "slurmdbd" and each node.
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
def lock_folder(folder: Path) -> Iterator[None]:
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
