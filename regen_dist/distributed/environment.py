"""Place of this process among the ranks: the only module that reads, writes and removes rank variables. No torch.

torchrun and our launcher set RANK, WORLD_SIZE and LOCAL_RANK; Slurm sets SLURM_PROCID and related variables for each
task of a step, and Submitit sets SUBMITIT_LOCAL_* where it starts tasks on this machine. If several are set, they must
agree. Ranks that our launcher starts get their place from it alone: the variables of the shell are removed first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from regen_dist.errors import ConfigError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
SUBMITIT = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")
# Seconds that a rank waits for the others to appear, before the job is one. Our launcher sets it: its ranks come, or it
# ends them all. Without it, variables that are left over in a shell must not wait for ranks that nobody starts.
JOIN_S = "REGEN_JOIN_S"
_JOIN_S, _LAUNCHED_JOIN_S = 60.0, 1800.0
# Variables of the launchers that make a process a rank, and that say where ranks meet.
_RANK_NAMES = frozenset((
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *(JOIN_S, "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("MPI_LOCALRANKID", "MPI_LOCALNRANKS", "MPIRUN_RANK", "SLURM_MPI_TYPE", "SLURM_TASK_PID", "SLURM_GTIDS"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE"),
    *("SLURM_TASKS_PER_NODE", "SLURM_DISTRIBUTION", "SLURM_LAUNCH_NODE_IPADDR"),
    *("SLURM_SRUN_COMM_HOST", "SLURM_SRUN_COMM_PORT"),
))  # fmt: skip
_RANK_PREFIXES = (
    *("TORCHELASTIC_", "SUBMITIT_", "SLURM_STEP_", "SLURM_STEPID", "SLURM_PMI", "OMPI_", "PMI_", "PMIX_", "PMI2_"),
    *("MV2_COMM_", "PALS_", "HYDI_", "JSM_NAMESPACE_", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_"),
)
# Below the ports that the kernel gives out by itself (32768 and up on Linux), above those of services.
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000


class RankInfo(NamedTuple):
    """A global rank, the number of ranks, and the rank among those of its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def read_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """The place that the environment gives this process; a process alone when it gives none.

    A scheduler's variables count for a process that has an address to meet at (MASTER_ADDR): without one it is merely
    inside an allocation, as a shell is. A task alone may start ranks of its own: it has no say about theirs; nor has
    any scheduler about those that torchrun started (one torchrun a node is one task a node).

    Raises:
        ConfigError: the variables disagree, or are no ranks.
    """
    own = read_variables(environment, TORCHRUN)
    if own and "TORCHELASTIC_RUN_ID" in environment:
        return own
    schedulers = {names: read_variables(environment, names) for names in (SLURM, SUBMITIT)}
    scheduled = {names: place for names, place in schedulers.items() if place is not None and place.world_size > 1}
    candidates = ({TORCHRUN: own} if own else {}) | (scheduled if own or "MASTER_ADDR" in environment else {})
    if len(set(candidates.values())) > 1:
        conflicts = "; ".join(f"{', '.join(names)} say {_format_rank(place)}" for names, place in candidates.items())
        raise ConfigError(f"it is not clear which rank this is: {conflicts}. Start the ranks by one of them")
    return next(iter(candidates.values()), RankInfo())


def starts_ranks(environment: Mapping[str, str], asked: bool) -> bool:
    """Return whether a command that can start ranks should do so; otherwise this process is itself a rank that
    something else has started. A single left-over variable does not make a rank.

    Args:
        environment: environment variables of this process.
        asked: a number of ranks was given (`--ranks`).

    Raises:
        ConfigError: `--ranks` in each of several ranks would start as many times more of them; or the variables make no
            sense (those of a shell are not looked at where `--ranks` is given).
    """
    if not asked:
        return read_variables(environment, TORCHRUN) is None and read_rank_info(environment).world_size == 1
    for names in (TORCHRUN, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        try:
            place = read_variables(environment, names)
        except ConfigError:
            continue
        if place is not None and place.world_size > 1 and (names is not TORCHRUN or "MASTER_ADDR" in environment):
            raise ConfigError(
                f"--ranks starts ranks, and this process is {_format_rank(place)} already ({names[0]}, {names[1]}). "
                f"Leave out --ranks, so that it is that rank; or, if these variables are stale: unset {' '.join(names)}"
            )
    return True


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables that launchers pass to their ranks, ours included; nothing else of a
    job is removed."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _RANK_NAMES and not name.startswith(_RANK_PREFIXES)
    }


def read_variables(environment: Mapping[str, str], names: tuple[str, str, str]) -> RankInfo | None:
    """The place that three variables give (rank, number of ranks, local rank); None where the first two are not set.

    Raises:
        ConfigError: they are no whole numbers, or the rank is not below the number of ranks.
    """
    found = [environment.get(name) for name in names]
    if found[0] is None or found[1] is None:
        return None
    try:
        place = RankInfo(*(int(value or 0) for value in found))
    except ValueError as error:
        raise ConfigError(f"{', '.join(names)} must be whole numbers, found {found}") from error
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(
            f"{names[0]}={place.rank} is not below {names[1]}={place.world_size}"
            "; unset both, or start the ranks with `regen train`, torchrun or Slurm"
        )
    return place


def rank_variables(place: RankInfo, *, local_world_size: int, address: str, port: int) -> dict[str, str]:
    """Return the variables that pass its place to a rank, and the address where the ranks meet."""
    numbers = dict(zip(TORCHRUN, place, strict=True)) | {"LOCAL_WORLD_SIZE": local_world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": address, JOIN_S: f"{_LAUNCHED_JOIN_S:g}"} | {
        name: str(number) for name, number in numbers.items()
    }


def join_timeout_s(environment: Mapping[str, str]) -> float:
    """Return how long a rank waits for the others to appear: REGEN_JOIN_S if set; else a long time if a scheduler or
    torchrun has started the ranks, and a minute if nothing but variables says that there are others.

    Raises:
        ConfigError: REGEN_JOIN_S is no number above 0.
    """
    if (given := environment.get(JOIN_S)) is not None:
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise ConfigError(f"{JOIN_S}={given!r} must be a number of seconds above 0; or leave it out")
        return seconds
    # An agent of torchrun serves the store before it starts a rank: one that does not answer is none.
    torchrun = "TORCHELASTIC_RUN_ID" in environment and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    tasks = read_variables(environment, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    return _LAUNCHED_JOIN_S if torchrun or (tasks is not None and tasks.world_size > 1) else _JOIN_S


def left_over_advice(environment: Mapping[str, str]) -> str:
    """Name the variables that make this process one of several ranks, and the way out if that is not intended."""
    names = [name for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT") if name in environment]
    values = " ".join(f"{name}={environment[name]}" for name in names)
    unset = sorted({*names, *(name for name in environment if name.startswith("TORCHELASTIC_"))})
    return (
        f"{values} make this process one of several. Start the others, too ({JOIN_S} sets for how many seconds they "
        f"are waited for); or, where these variables are left over in the shell: unset {' '.join(unset)} (then --ranks "
        "N starts ranks here)"
    )


def meeting_port(*what: object) -> int:
    """Return the port on which the ranks of one start meet: the same for all that pass the same values, such as job and
    restart."""
    return _FIRST_PORT + zlib.crc32(repr(what).encode()) % _NUM_PORTS


def _format_rank(place: RankInfo) -> str:
    return f"rank {place.rank} of {place.world_size}, local rank {place.local_rank}"
