"""Which rank this process is: the one place that reads and writes rank variables. Imports no torch.

torchrun and our launcher set RANK, WORLD_SIZE and LOCAL_RANK; Slurm sets SLURM_PROCID and its kin for each task of a
step, and Submitit SUBMITIT_LOCAL_* where it starts tasks on this machine. Where several speak they must agree.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

from regen_dist.errors import ConfigError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
SUBMITIT = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")
# Below the ports that the kernel gives out by itself (32768 and up on Linux), above those of services.
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000


class Place(NamedTuple):
    """A global rank, the number of ranks, and the rank among those of its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that the environment gives this process; a process alone when it gives none.

    A scheduler's variables count for a process that has an address to meet at (MASTER_ADDR): without one it is merely
    inside an allocation, as a shell is. A task alone may start ranks of its own: it has no say about theirs.

    Raises:
        ConfigError: the variables disagree, or are no ranks.
    """
    own = read_variables(environment, TORCHRUN)
    schedulers = {names: read_variables(environment, names) for names in (SLURM, SUBMITIT)}
    said = {names: place for names, place in schedulers.items() if place is not None and place.world_size > 1}
    told = ({TORCHRUN: own} if own else {}) | (said if own or "MASTER_ADDR" in environment else {})
    if len(set(told.values())) > 1:
        heard = "; ".join(f"{', '.join(names)} say {_shown(place)}" for names, place in told.items())
        raise ConfigError(f"it is not clear which rank this is: {heard}. Start the ranks by one of them")
    return next(iter(told.values()), Place())


def read_variables(environment: Mapping[str, str], names: tuple[str, str, str]) -> Place | None:
    """The place that three variables give (rank, number of ranks, local rank); None where the first two are not set.

    Raises:
        ConfigError: they are no whole numbers, or the rank is not below the number of ranks.
    """
    found = [environment.get(name) for name in names]
    if found[0] is None or found[1] is None:
        return None
    try:
        place = Place(*(int(value or 0) for value in found))
    except ValueError as error:
        raise ConfigError(f"{', '.join(names)} must be whole numbers, found {found}") from error
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(f"{names[0]}={place.rank} is not below {names[1]}={place.world_size}")
    return place


def rank_variables(place: Place, *, local_world_size: int, address: str, port: int) -> dict[str, str]:
    """What a rank is told of its place, and where the ranks meet."""
    numbers = dict(zip(TORCHRUN, place, strict=True)) | {"LOCAL_WORLD_SIZE": local_world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": address} | {name: str(number) for name, number in numbers.items()}


def meeting_port(*what: object) -> int:
    """A port on which the ranks of one start meet, the same for all who name the same things, as job and restart."""
    return _FIRST_PORT + zlib.crc32(repr(what).encode()) % _NUM_PORTS


def _shown(place: Place) -> str:
    return f"rank {place.rank} of {place.world_size}, local rank {place.local_rank}"
