"""Checks of what a job asks of the scheduler: Slurm's own validation, ranks and GPUs, GPU memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher import slurm
from launcher.cluster import ClusterConfig
from launcher.job import LAUNCH
from launcher.preflight.findings import NoEstimate, PreflightFinding, Subject, by_run, make_note, problem
from launcher.script import batch_script
from regen_dist.config import AnyRunConfig
from regen_dist.config.identity import clips_per_rank
from regen_dist.errors import ConfigError

_VARIABLE = re.compile(r"\$\{?[A-Za-z_]")
_NO_SUCH_NODES = "node configuration is not available"  # also where the nodes are there, but down
_WRONG_ARRAY = "Invalid job array specification"
_NOTHING = ("UNLIMITED", "INFINITE", "N/A", "")


def scheduler(subject: Subject) -> Iterator[PreflightFinding]:
    """Check the batch script with Slurm, and limits that Slurm would accept but never satisfy."""
    request, cluster = subject.request, subject.request.cluster
    if literal := [name for name, value in cluster.environment.items() if _VARIABLE.search(value)]:
        yield make_note(
            f"cluster key environment: {', '.join(literal)}: `$` is taken literally; what builds on a variable of "
            "the node is a line of activate, `export NAME=…:$NAME`"
        )
    if not subject.on_slurm:
        return
    script = batch_script(request.job(request.base / LAUNCH / "DATE", request.base / LAUNCH / "code" / "HASH"))
    if not slurm.is_available():
        yield problem("sbatch not found: submit where Slurm is installed, or with --cluster local")
        return
    if found := slurm.ignored_variables():
        yield make_note(
            f"{', '.join(found)} of this shell do not reach the job; set such options in the cluster's file"
        )
    partitions = _chosen(_partitions(), cluster.partition)
    refused = slurm.refusal(script)
    away = slurm.unavailable_nodes(cluster.partition) if _NO_SUCH_NODES in refused else 0
    if away:
        yield make_note(f"{away} node(s) are down or drained: the job may wait for them ({refused})")
    elif _WRONG_ARRAY in refused:
        yield problem(f"Slurm would refuse the array of {len(request.tasks)} tasks: {refused}. {_array_limit()}")
    elif refused:
        what = (
            f"{cluster.nodes} node(s) x {cluster.gpus_per_node} GPU(s) for {cluster.time_min} min; "
            f"{cluster.ranks_per_node} rank(s) a node, cpus_per_task {cluster.cpus_per_task or 'not set'}, "
            f"memory_gb {cluster.memory_gb or 'not set'}"
        )
        yield problem(f"Slurm would refuse the job ({what}): {refused}. {_allowed(partitions, cluster)}")
    elif partitions:
        yield from _check_time_limit(partitions, cluster)


def _partitions() -> list[dict[str, str]]:
    """Return the controller's fields of each partition."""
    lines = slurm.run_program("scontrol", "show", "partition", "--oneliner").splitlines()
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]


def _chosen(partitions: list[dict[str, str]], named: str | None) -> list[dict[str, str]]:
    """Return the partitions in which the job may start: those named, or the default."""
    if named is None:
        return [each for each in partitions if each.get("Default") == "YES"]
    return [each for each in partitions if each["PartitionName"] in named.split(",")]


def _allowed(partitions: list[dict[str, str]], cluster: ClusterConfig) -> str:
    """Describe the available resources, for the message of a refusal."""
    if not partitions:
        known = ", ".join(each["PartitionName"] for each in _partitions())
        return f"There is no partition {cluster.partition!r}; set partition to one of: {known}"
    described = []
    for each in partitions:
        name = each["PartitionName"]
        nodes = (
            each["TotalNodes"] if each["MaxNodes"] in _NOTHING else min(each["TotalNodes"], each["MaxNodes"], key=int)
        )
        described.append(f"partition {name}: at most {nodes} node(s) ({_node_kinds(name)}), {each['MaxTime']}")
    return f"There is: {'; '.join(described)} (nodes, of which each has; time limit)"


def _array_limit() -> str:
    """Tell how many tasks an array may have: their indices are less than MaxArraySize."""
    lines = slurm.run_program("scontrol", "show", "config").splitlines()
    found = next((line.split("=")[1].strip() for line in lines if line.startswith("MaxArraySize")), "unknown")
    return f"Its MaxArraySize is {found}: give each task a larger share of the work, and --array at most that number"


def _node_kinds(partition: str) -> str:
    lines = slurm.run_program("sinfo", "--noheader", f"--partition={partition}", "--format=%G|%c|%m").splitlines()
    kinds = [line.split("|") for line in dict.fromkeys(lines)]
    return " or ".join(
        f"{gres if gres != '(null)' else 'no GPU'}, {cores} cores, {memory} MB" for gres, cores, memory in kinds
    )


def _check_time_limit(partitions: list[dict[str, str]], cluster: ClusterConfig) -> Iterator[PreflightFinding]:
    """Yield jobs that Slurm accepts but would never start because of their time limit (EnforcePartLimits=NO)."""
    requested_min = cluster.time_min or 0
    names = ", ".join(each["PartitionName"] for each in partitions)
    if all(each["State"] != "UP" for each in partitions):
        states = ", ".join(dict.fromkeys(each["State"] for each in partitions))
        yield problem(f"partition {names} is {states}: the job would wait forever; set another by --set partition=NAME")
    limits = [_minutes(each["MaxTime"]) for each in partitions]
    longest = max((limit for limit in limits if limit is not None), default=0.0)
    if None not in limits and requested_min > longest:
        yield problem(
            f"time_min {requested_min} is longer than partition {names} allows ({longest:g} min): the job would wait "
            f"forever; give --time {int(longest)}, it is requeued and goes on"
        )


def _minutes(described: str) -> float | None:
    """Convert "2-00:30:00" to minutes; None if there is no limit."""
    if described in _NOTHING:
        return None
    days, _, clock = described.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60


# Checks of GPUs and GPU memory.


def ranks_and_gpus(subject: Subject) -> Iterator[PreflightFinding]:
    """Check that every rank has a GPU and none is idle."""
    cluster = subject.request.cluster
    if not subject.configs or not cluster.gpus_per_node:
        return
    ranks, gpus = cluster.ranks_per_node, cluster.gpus_per_node
    if ranks > gpus:
        yield problem(f"{ranks} ranks on a node of {gpus} GPU(s), and each needs one; set --tasks-per-node {gpus}")
    elif ranks < gpus:
        yield make_note(
            f"{gpus - ranks} of {gpus} GPUs of each node will idle: each rank uses one, and there are {ranks}"
        )


# GPU memory of the model and its training state.
GIB = 2**30
TIGHT = 0.85  # the estimate leaves out the CUDA context, fragmentation and workspaces
_TERMS = 3


def gpu_memory(subject: Subject) -> Iterator[PreflightFinding]:
    """Compare the estimate of `regen describe` with `gpu_memory_gb` of the cluster."""
    cluster = subject.request.cluster
    if cluster.gpu_memory_gb and cluster.gpus_per_node:
        yield from by_run(subject.configs, lambda config: _memory_of(config, subject, cluster.gpu_memory_gb or 0.0))


def _memory_of(config: AnyRunConfig, subject: Subject, card_gb: float) -> Iterator[PreflightFinding]:
    world_size = subject.request.cluster.world_size
    try:
        clips_per_rank(config, world_size)
        terms = subject.estimates.of(config, world_size).memory
    except ConfigError:  # reported by another check
        return
    except NoEstimate as error:
        yield make_note(f"GPU memory was not estimated: {error}")
        return
    total = sum(terms.values()) / GIB
    if total > card_gb:
        yield problem(
            f"about {total:.1f} GiB are needed on each of {world_size} GPUs, a card has {card_gb:g} (gpu_memory_gb); "
            f"most of it: {_largest(terms)}. {_advice(config)} (`regen describe` shows all of it)"
        )
    elif total > TIGHT * card_gb:
        yield make_note(
            f"about {total:.1f} GiB are needed on each of {world_size} GPUs, {total / card_gb:.0%} of a card's "
            f"{card_gb:g} (gpu_memory_gb); most of it: {_largest(terms)}"
        )


def _largest(terms: dict[str, int]) -> str:
    ordered = sorted(terms.items(), key=lambda term: -term[1])[:_TERMS]
    return "; ".join(f"{name} {size / GIB:.1f} GiB" for name, size in ordered)


def _advice(config: AnyRunConfig) -> str:
    """Return ways to lower the memory that this config does not use yet."""
    ways = ["take more GPUs"] if config.engine.kind == "zero3" else ["set engine.kind=zero3 and take more GPUs"]
    ways.append(f"raise train.accumulation (now {config.train.accumulation})")
    if config.engine.activation_checkpointing is not True:
        ways.append("set engine.activation_checkpointing=true")
    return f"To lower it, {', '.join(ways[:-1])}, or {ways[-1]}"
