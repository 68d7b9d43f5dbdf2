"""Whether a config fits a number of ranks."""

from __future__ import annotations

from regen_dist.config.job import CommonConfig
from regen_dist.errors import ConfigError


def clips_per_rank(config: CommonConfig, world_size: int) -> int:
    """Clips of one micro-batch on one rank; ranks that share rows of tokens have the same clips.

    Raises:
        ConfigError: the global batch cannot be divided over that many ranks; names the numbers that fit.
    """
    if config.engine.kind == "plain" and world_size > 1:
        raise ConfigError(f"engine.kind=plain trains in one process, found {world_size} ranks; set engine.kind=zero3")
    train, shared = config.train, config.engine.sequence_parallel
    return micro_batch_size(train.batch_global, train.accumulation, num_readers(config, world_size), shared)


def micro_batch_size(batch_global: int, accumulation: int, readers: int, shared: int = 1) -> int:
    """Divide a global batch into micro-batches: samples of each. The one place where a batch is divided.

    Args:
        batch_global: samples of an optimizer step over all ranks.
        accumulation: micro-batches of a step, one after the other.
        readers: ranks, or groups of ranks, that have samples of their own.
        shared: ranks of such a group.

    Raises:
        ConfigError: it does not divide evenly; names the numbers of ranks that fit.
    """
    if readers < 1:
        raise ConfigError(f"found {readers * shared} ranks; at least 1 is needed")
    micro_batch, rest = divmod(batch_global, accumulation)
    if rest or not micro_batch or micro_batch % readers:
        fitting = [str(shared * number) for number in range(1, micro_batch + 1) if micro_batch % number == 0]
        groups = f" in groups of {shared} (engine.sequence_parallel)" if shared > 1 else ""
        remedy = f"ranks that fit: {', '.join(fitting)}"
        if rest or not micro_batch:
            remedy = "set train.batch_global to a multiple of train.accumulation"
        raise ConfigError(
            f"train.batch_global {batch_global} over train.accumulation {accumulation} is "
            f"{batch_global / accumulation:g} samples at a time, not a multiple of {readers * shared} ranks{groups}; "
            f"{remedy}"
        )
    return micro_batch // readers


def num_readers(config: CommonConfig, world_size: int) -> int:
    """How many ranks, or groups of ranks that share rows of tokens, have samples of their own.

    Raises:
        ConfigError: the ranks cannot be grouped so.
    """
    readers, rest = divmod(world_size, config.engine.sequence_parallel)
    if rest:
        raise ConfigError(
            f"engine.sequence_parallel {config.engine.sequence_parallel} groups ranks, and {world_size} ranks are no "
            "multiple of it; take a number of ranks that is, or set engine.sequence_parallel=1"
        )
    return readers
