"""Whether a config fits a number of ranks."""

from __future__ import annotations

from regen_dist.config.job import CommonConfig
from regen_dist.errors import ConfigError


def clips_per_rank(config: CommonConfig, world_size: int) -> int:
    """Clips of one micro-batch on one rank; ranks that share rows of tokens have the same clips.

    Raises:
        ConfigError: the global batch cannot be divided over that many ranks; names the numbers that fit.
    """
    if world_size < 1:
        raise ConfigError(f"found {world_size} ranks; at least 1 is needed")
    if config.engine.kind == "plain" and world_size > 1:
        raise ConfigError(f"engine.kind=plain trains in one process, found {world_size} ranks; set engine.kind=zero3")
    micro_batch, readers = config.train.batch_global // config.train.accumulation, num_readers(config, world_size)
    if micro_batch % readers:
        shared = config.engine.sequence_parallel
        fitting = ", ".join(str(shared * number) for number in range(1, micro_batch + 1) if micro_batch % number == 0)
        groups = f" in groups of {shared} (engine.sequence_parallel)" if shared > 1 else ""
        raise ConfigError(
            f"train.batch_global {config.train.batch_global} over train.accumulation {config.train.accumulation} is "
            f"{micro_batch} samples at a time, not a multiple of {world_size} ranks{groups}; ranks that fit: {fitting}"
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
