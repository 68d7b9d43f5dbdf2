"""Whether a config fits a number of ranks."""

from __future__ import annotations

from regen_dist.config.job import CommonConfig
from regen_dist.errors import ConfigError


def clips_per_rank(config: CommonConfig, world_size: int) -> int:
    """Clips of one micro-batch on one rank.

    Raises:
        ConfigError: the global batch cannot be divided over that many ranks; names the numbers that fit.
    """
    if world_size < 1:
        raise ConfigError(f"found {world_size} ranks; at least 1 is needed")
    if config.engine.kind == "plain" and world_size > 1:
        raise ConfigError(f"engine.kind=plain trains in one process, found {world_size} ranks; set engine.kind=zero3")
    micro_batch = config.train.batch_global // config.train.accumulation
    if micro_batch % world_size:
        fitting = ", ".join(str(number) for number in range(1, micro_batch + 1) if micro_batch % number == 0)
        raise ConfigError(
            f"train.batch_global {config.train.batch_global} over train.accumulation {config.train.accumulation} is "
            f"{micro_batch} samples at a time, not a multiple of {world_size} ranks; ranks that fit: {fitting}"
        )
    return micro_batch // world_size
