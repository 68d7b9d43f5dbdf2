"""Whether a config can run on what the job asks for: the refusals that every rank would otherwise come up with."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from launcher.cluster import ClusterConfig
from launcher.preflight.findings import Finding, Subject, by_run, note, problem
from regen_dist.config import AnyRunConfig, T2VConfig
from regen_dist.config.worldsize import clips_per_rank
from regen_dist.errors import ConfigError


def world_size(subject: Subject) -> Iterator[Finding]:
    """The batch is shared out evenly over the ranks, and every rank has a GPU for itself."""
    cluster = subject.order.cluster
    if subject.configs and cluster.gpus_per_node:
        yield from _ranks_and_gpus(cluster)

    def look(config: AnyRunConfig) -> Iterator[Finding]:
        try:
            clips_per_rank(config, cluster.world_size)
        except ConfigError as error:
            yield problem(str(error))

    yield from by_run(subject.configs, look)


def _ranks_and_gpus(cluster: ClusterConfig) -> Iterator[Finding]:
    ranks, gpus = cluster.ranks_per_node, cluster.gpus_per_node
    if ranks > gpus:
        yield problem(f"{ranks} ranks on a node of {gpus} GPU(s), and each needs one; set --tasks-per-node {gpus}")
    elif ranks < gpus:
        yield note(f"{gpus - ranks} of {gpus} GPUs of each node will idle: each rank uses one, and there are {ranks}")


def kernels(subject: Subject) -> Iterator[Finding]:
    """Attention and optimizer run on the device that there is, and their packages are installed."""
    yield from by_run(subject.configs, lambda config: _kernels_of(config, subject.order.cluster))


def _kernels_of(config: AnyRunConfig, cluster: ClusterConfig) -> Iterator[Finding]:
    has_gpus = cluster.gpus_per_node > 0
    key, backend = _attention(config)
    if backend == "flash":
        mend = f"set {key}=sdpa"
        if not has_gpus:
            yield problem(f"{key}=flash needs GPUs, and the job has none; {mend}")
        elif config.engine.precision != "bf16":
            yield problem(f"{key}=flash computes in bf16; set engine.precision=bf16, or {mend}")
        if _is_ours(cluster) and not _is_installed("flash_attn"):
            yield problem(f"{key}=flash needs the package flash-attn; install it, or {mend}")
    yield from _optimizer(config, cluster, has_gpus)


def _attention(config: AnyRunConfig) -> tuple[str, str]:
    """The key that names the kernel of attention, and its value; "" for a model without."""
    if isinstance(config, T2VConfig):
        return "model.attention.backend", config.model.attention.backend
    attends = config.model.kind == "regen"
    return "model.decoder.attention.backend", config.model.decoder.attention.backend if attends else ""


def _optimizer(config: AnyRunConfig, cluster: ClusterConfig, has_gpus: bool) -> Iterator[Finding]:
    kind, mend = config.optimizer.kind, "set optimizer.kind=adamw"
    if kind == "fused_adam" and not has_gpus:
        yield problem(f"optimizer.kind=fused_adam (apex) needs GPUs, and the job has none; {mend}")
    if kind == "fused_adam" and _is_ours(cluster) and not _is_installed("apex", "optimizers"):
        yield problem(
            "optimizer.kind=fused_adam needs NVIDIA apex, which is built from source (see environment.yml; PyPI's "
            f"`apex` is another package); or {mend}"
        )
    if kind == "cpu_adam" and has_gpus:
        yield problem(f"optimizer.kind=cpu_adam is for models on the CPU, and the job has GPUs; {mend}")
    if kind == "cpu_adam" and config.engine.kind == "plain":
        yield problem(f"optimizer.kind=cpu_adam is DeepSpeed's; set engine.kind=zero3, or {mend}")


def _is_ours(cluster: ClusterConfig) -> bool:
    """Whether the ranks run in this Python: what is installed elsewhere cannot be seen from here."""
    return cluster.python is None and not cluster.activate


def _is_installed(package: str, part: str = "") -> bool:
    """Whether a package can be found (with a part that tells it from another of the same name), without importing
    it."""
    found = find_spec(package)
    places = found.submodule_search_locations if found else None
    return any((Path(place) / part).exists() for place in places or ())
