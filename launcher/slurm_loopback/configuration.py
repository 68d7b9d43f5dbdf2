"""The text of the cluster's configuration files: a function of what was asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MEMORY_MB = 4000  # of a node, as declared; nothing holds jobs to it
DATABASE = "slurm_acct_db"


@dataclass(frozen=True)
class Design:
    """What a cluster looks like and where it listens.

    Args:
        folder: for all its files; short enough for Unix sockets.
        host: name of the machine that it runs on.
        user: who owns it and may submit to it.
        nodes: number of nodes, named node1, node2, ….
        cpus: of each node, as declared; nodes share the cores of the machine.
        gpus: of each node; devices in name alone.
        accounting: whether slurmdbd keeps what `sacct` tells.
        grace_s: between the signal that a job gets when it is preempted and its end.
        ports: on 127.0.0.1, of "slurmctld", "slurmdbd" and each node.
        first_job_id: drawn, or a folder that is named by a job id would be taken for that of an older cluster's job.
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
        """Of the nodes."""
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def munge(self) -> Path:
        """The socket of the daemon that vouches for users."""
        return self.folder / "run" / "munge.sock"

    @property
    def database(self) -> Path:
        """The socket of MariaDB, which listens nowhere else."""
        return self.folder / "run" / "database.sock"


def files(design: Design) -> dict[str, str]:
    """Every configuration file by its name."""
    written = {"slurm.conf": slurm_conf(design), "gres.conf": gres_conf(design)}
    return written | {"slurmdbd.conf": slurmdbd_conf(design)} if design.accounting else written


def slurm_conf(design: Design) -> str:
    """What every daemon and every client of the cluster reads."""
    folder = design.folder
    gres = f" Gres=gpu:{design.gpus}" if design.gpus else ""
    return "\n".join(
        [
            "ClusterName=loopback",
            f"SlurmctldHost={design.host}(127.0.0.1)",
            f"SlurmctldPort={design.ports['slurmctld']}",
            f"SlurmUser={design.user}",
            f"SlurmdUser={design.user}",
            # Slurm holds a requeued job for as long as a credential lives: 120 s by default
            f"AuthInfo=socket={design.munge},cred_expire=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/run/slurmctld.pid",
            f"SlurmdPidFile={folder}/run/%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld.log",
            f"SlurmdLogFile={folder}/log/%n.log",
            "SlurmctldDebug=verbose",
            "SlurmdDebug=verbose",
            # Daemons and clients listen on the address of the host name alone, and that is loopback
            "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
            # No cgroups, no privileges, no look at the hardware
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
            "SlurmdTimeout=15",  # a node that does not answer is down, and its jobs are requeued
            "CompleteWait=0",
            "InactiveLimit=0",
            "MinJobAge=3600",  # `scontrol show job` and `squeue --states all` know jobs that ended
            "MailProg=/bin/true",
            # A job of a higher tier ends one of a lower, which gets the signal that it asked for first, and is requeued
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
    """What slurmdbd reads. It reaches the database by a socket whose path is in its environment (MYSQL_UNIX_PORT)."""
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
    """The GPUs of a node. Slurm wants a file for each: a count alone registers none."""
    if not design.gpus:
        return ""
    numbers = f"[0-{design.gpus - 1}]" if design.gpus > 1 else "0"
    return f"Name=gpu File={design.folder}/dev/gpu{numbers}\n"


def hosts(design: Design, machine: str) -> str:
    """`/etc/hosts` as the cluster sees it: that of the machine, in which the cluster's names are all loopback."""
    ours = {design.host, *design.names}
    kept = [line for line in machine.splitlines() if not ours & set(line.partition("#")[0].split()[1:])]
    return "\n".join([f"127.0.0.1 localhost {' '.join(sorted(ours))}", *kept, ""])
