"""Checks of GPUs and GPU memory."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.preflight.findings import NoEstimate, PreflightFinding, Subject, by_run, make_note, problem
from regen_dist.config import AnyRunConfig
from regen_dist.config.identity import clips_per_rank
from regen_dist.errors import ConfigError


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
