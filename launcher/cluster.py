"""Clusters: files under `configs/cluster/`, which say what a job needs there and how its processes start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from regen_dist.config.files import load_section
from regen_dist.config.run import PositiveFloat, PositiveInt, Section
from regen_dist.config.urls import expand_home
from regen_dist.distributed.environment import without_ranks
from regen_dist.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "cluster"
# What the launcher sets itself: two values for one option would leave it to sbatch which of them counts.
_OURS = ("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "open-mode", "output")
_OURS_TOO = ("requeue", "no-requeue", "signal", "time", "wait", "parsable", "test-only")
_FIELDS = ("partition", "account", "qos", "constraint", "exclusive", "exclude", "nodelist")


class RetryConfig(Section):
    """When a job that did not end well is started again."""

    failures: Annotated[int, Field(ge=0)] = 3  # in a row, without a new checkpoint between them
    starts_without_progress: PositiveInt = 5  # of whatever reason, so that a job in a loop is noticed
    failures_of_a_node: PositiveInt = 2  # then the node is left out
    starts: PositiveInt = 1000  # in all: the last fuse


class ClusterConfig(Section):
    """A place where jobs run. What a job asks for (nodes, GPUs, time) is a default that a command may change."""

    kind: Literal["slurm", "local"] = "slurm"
    nodes: PositiveInt = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    tasks_per_node: PositiveInt | None = None  # ranks of a node. None: one for each GPU, or one
    cpus_per_task: PositiveInt | None = None
    memory_gb: PositiveFloat | None = None  # of a node
    time_min: PositiveInt | None = None  # None: as long as it lasts (this machine alone)
    signal_lead_s: PositiveInt = 300  # so long before the time limit a job is told to save
    gpu_type: str | None = None  # of GRES, as "h100"; None asks for any
    gpu_memory_gb: PositiveFloat | None = None  # of one card, for the estimate before submitting

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: tuple[str, ...] = ()
    nodelist: tuple[str, ...] = ()
    exclusive: bool = False
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)  # any other option of sbatch, without its dashes
    srun: tuple[str, ...] = ()  # more arguments for srun
    array_parallelism: PositiveInt = 256  # tasks of an array at once

    shared: Path | None = None  # a folder that all nodes see; run folders must lie in it
    activate: tuple[str, ...] = ()  # shell lines before everything else, as `module load` or a conda activation
    python: str | None = None  # a shell command in the place of this Python, as `apptainer exec --nv IMAGE python`
    environment: dict[str, str] = Field(default_factory=dict)  # of every process of the job
    retry: RetryConfig = RetryConfig()

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @field_validator("shared")
    @classmethod
    def _home_is_expanded(cls, shared: Path | None) -> Path | None:
        return None if shared is None else Path(expand_home(str(shared)))

    @field_validator("environment")
    @classmethod
    def _names_can_be_exported(cls, environment: dict[str, str]) -> dict[str, str]:
        wrong = [name for name in environment if not name.isidentifier() or not name.isascii()]
        if wrong:
            raise ValueError(f"{', '.join(map(repr, wrong))}: no name of an environment variable")
        if ours := sorted({*environment} - {*without_ranks(environment)}):
            raise ValueError(f"{', '.join(ours)}: set by the launcher for each rank; leave it out")
        return environment

    @field_validator("sbatch")
    @classmethod
    def _options_are_not_set_twice(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        named = {name.replace("_", "-") for name in options}
        if wrong := sorted(named & {*_OURS, *_OURS_TOO}):
            raise ValueError(f"{', '.join(wrong)}: set by the launcher; choose it by the command's options instead")
        if wrong := sorted(named & {*_FIELDS}):
            raise ValueError(f"{', '.join(wrong)}: has a key of its own in this file; set that")
        return options

    @model_validator(mode="after")
    def _a_place_is_whole(self) -> ClusterConfig:
        if self.kind == "slurm" and self.time_min is None:
            raise ValueError("time_min is required for kind: slurm; a job without a limit waits longest in the queue")
        if self.kind == "local" and self.nodes > 1:
            raise ValueError(f"nodes {self.nodes}: kind: local is this machine; give --tasks-per-node for more ranks")
        if self.time_min is not None and self.signal_lead_s >= self.time_min * 60:
            raise ValueError(
                f"signal_lead_s {self.signal_lead_s} leaves no time to work within {self.time_min} min; "
                "raise time_min or lower signal_lead_s"
            )
        return self


def load_cluster(name: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """A cluster by the name of its file in `configs/cluster/` (of this folder, or of this checkout), or by its path.

    Args:
        name: as "slurm", or "clusters/mine.yaml".
        overrides: `a.b=c`, as of any config.

    Raises:
        ConfigError: there is no such file (names those that there are), or it is wrong.
    """
    return load_section(ClusterConfig, find_file(name), overrides)


def find_file(name: str) -> Path:
    """The file of a cluster.

    Raises:
        ConfigError: there is none.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    places = [Path("configs") / "cluster", CONFIGS]
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    known = sorted({file.stem for place in places for file in place.glob("*.yaml")})
    raise ConfigError(f"no cluster {name!r}; there are {', '.join(known)} in configs/cluster, or give a path to a file")
