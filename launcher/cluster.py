"""Cluster files (`configs/cluster/`): the resources of a job on a machine, and how its processes are started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from regen_dist.config.files import load_section
from regen_dist.config.run import NonNegativeInt, PositiveFloat, PositiveInt, Section
from regen_dist.config.urls import expand_home
from regen_dist.distributed.environment import without_ranks
from regen_dist.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "cluster"
# Options that the launcher sets itself. sbatch would have to choose between two values of one option.
_OURS = ("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "open-mode", "output")
_OURS_TOO = ("ntasks", "requeue", "no-requeue", "signal", "time", "wait", "parsable", "quiet", "test-only")
_FIELDS = {name: name for name in ("partition", "account", "qos", "constraint", "exclusive", "exclude", "nodelist")}
_FIELDS |= {"cpus-per-task": "cpus_per_task", "gpus-per-node": "gpus_per_node", "ntasks-per-node": "tasks_per_node"}


class RetryConfig(Section):
    """Limits on restarting a job that failed or was interrupted."""

    failures: NonNegativeInt = Field(
        default=3, description="Failures in a row without a new checkpoint; then the job ends."
    )
    starts_without_progress: PositiveInt = Field(
        default=5,
        description="Starts for any reason without a new checkpoint; then the job ends: breaks restart loops.",
    )
    failures_of_a_node: PositiveInt = Field(default=2, description="Failures on a node after which it is excluded.")
    starts: PositiveInt = Field(default=1000, description="Starts in all; then the job ends.")


class ClusterConfig(Section):
    """A cluster or machine that runs jobs; commands may override nodes, GPUs and time."""

    kind: Literal["slurm", "local"] = Field(
        default="slurm", description="slurm, or local: this machine, in the background."
    )
    nodes: PositiveInt = Field(default=1, description="Nodes of a job; commands override it with --nodes.")
    gpus_per_node: NonNegativeInt = Field(default=0, description="GPUs of each node.")
    tasks_per_node: PositiveInt | None = Field(
        default=None, description="Ranks of each node; null: one per GPU, or one without GPUs."
    )
    cpus_per_task: PositiveInt | None = Field(
        default=None, description="CPU cores of each rank; null: the site's default."
    )
    memory_gb: PositiveFloat | None = Field(
        default=None, description="Memory of each node in GB; null: the site's default."
    )
    time_min: PositiveInt | None = Field(
        default=None, description="Time limit in minutes, required on Slurm; null: no limit (local only)."
    )
    signal_lead_s: PositiveInt = Field(
        default=300,
        description="Seconds before the time limit at which a job is signalled to save; two steps, two saves and a "
        "validation must fit.",
    )
    gpu_type: str | None = Field(default=None, description="GPU type of the site's GRES, such as h100; null: any.")
    gpu_memory_gb: PositiveFloat | None = Field(
        default=None,
        description="Memory of each GPU in GB, which preflight compares with its estimate; null: not compared.",
    )

    partition: str | None = Field(default=None, description="Slurm partition; null: the site's default.")
    account: str | None = Field(default=None, description="Slurm account; null: the user's default.")
    qos: str | None = Field(default=None, description="Slurm quality of service; null: the default.")
    constraint: str | None = Field(
        default=None, description="Slurm constraint: features that nodes must have; null: none."
    )
    exclude: tuple[str, ...] = Field(default=(), description="Nodes that jobs avoid.")
    nodelist: tuple[str, ...] = Field(default=(), description="Nodes that jobs must include.")
    exclusive: bool = Field(default=False, description="Share nodes with no other job.")
    sbatch: dict[str, str | int | bool] = Field(
        default_factory=dict, description="Any other option of sbatch, without its dashes, such as {comment: regen}."
    )
    srun: tuple[str, ...] = Field(default=(), description="Extra arguments of srun.")
    array_parallelism: PositiveInt = Field(default=256, description="Tasks of an array that run at the same time.")

    shared: Path | None = Field(
        default=None, description="Folder that all nodes see; run folders must lie in it. Null: not checked."
    )
    activate: tuple[str, ...] = Field(
        default=(), description="Shell lines that run first, such as `module load` or a conda activation."
    )
    python: str | None = Field(
        default=None,
        description="Shell command that replaces this Python, such as `apptainer exec --nv IMAGE python`; null: this "
        "one.",
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment variables of every process of the job."
    )
    retry: RetryConfig = Field(default=RetryConfig(), description="Limits on restarts.")

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @field_validator("shared")
    @classmethod
    def _expand_home(cls, shared: Path | None) -> Path | None:
        return None if shared is None else Path(expand_home(str(shared)))

    @field_validator("environment")
    @classmethod
    def _check_environment_names(cls, environment: dict[str, str]) -> dict[str, str]:
        wrong = [name for name in environment if not name.isidentifier() or not name.isascii()]
        if wrong:
            raise ValueError(f"{', '.join(map(repr, wrong))}: not a valid environment variable name")
        if ours := sorted({*environment} - {*without_ranks(environment)}):
            raise ValueError(f"{', '.join(ours)}: set by the launcher for each rank; remove it")
        return environment

    @field_validator("sbatch")
    @classmethod
    def _check_options(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        named = {name.replace("_", "-") for name in options}
        if wrong := sorted(named & {*_OURS, *_OURS_TOO}):
            raise ValueError(f"{', '.join(wrong)}: set by the launcher; use the options of the command instead")
        if wrong := sorted(named & {*_FIELDS}):
            keys = ", ".join(_FIELDS[each] for each in wrong)
            raise ValueError(f"{', '.join(wrong)}: has its own key in this file; set that key ({keys})")
        if "clusters" in named:
            raise ValueError("clusters: jobs are looked for in the cluster of this machine; submit from one of its own")
        return options

    @model_validator(mode="after")
    def _check_limits(self) -> ClusterConfig:
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
    """Return a cluster by its path, or by its file's name in `configs/cluster/` (current folder, then this checkout).

    Args:
        name: "slurm" or "clusters/mine.yaml", for example.
        overrides: `a.b=c`, as for any config.

    Raises:
        ConfigError: the file does not exist (lists those that do) or is invalid.
    """
    return load_section(ClusterConfig, find_file(name), overrides)


def find_file(name: str) -> Path:
    """Return the path of a cluster file.

    Raises:
        ConfigError: the file does not exist.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    places = [Path("configs") / "cluster", CONFIGS]
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    known = sorted({file.stem for place in places for file in place.glob("*.yaml")})
    raise ConfigError(
        f"no cluster {name!r}; choose one of {', '.join(known)} (configs/cluster/), or give a path to a file"
    )
