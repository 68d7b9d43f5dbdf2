"""A global batch is divided in one place: the config's check, the order of the data and DeepSpeed give one answer."""

from __future__ import annotations

import re

import pytest

from regen_dist.config.identity import clips_per_rank, micro_batch_size
from regen_dist.data.order.order import DataOrder
from regen_dist.distributed.zero3 import deepspeed_settings
from regen_dist.errors import ConfigError
from tests.helpers.tiny import tiny_run


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize(("batch", "accumulation"), [(24, 1), (24, 3), (8, 2), (7, 1)])
def test_all_who_divide_agree(batch: int, accumulation: int, world_size: int) -> None:
    config = tiny_run(train__batch_global=batch, train__accumulation=accumulation, engine__kind="zero3")
    order = DataOrder.single(100, batch, 0)
    fits = batch % (accumulation * world_size) == 0
    if not fits:
        for divide in (
            lambda: clips_per_rank(config, world_size),
            lambda: order.micro_batch(0, 0, accumulation, 0, world_size),
            lambda: deepspeed_settings(config, world_size),
        ):
            with pytest.raises(ConfigError, match=r"ranks that fit: ([\d, ]+)$") as refused:
                divide()
            fitting = re.findall(r"\d+", str(refused.value).rpartition(":")[2])
            assert [int(number) for number in fitting] == [
                number for number in range(1, batch + 1) if batch % (accumulation * number) == 0
            ]
        return
    size = clips_per_rank(config, world_size)
    assert size * accumulation * world_size == batch
    assert len(order.micro_batch(0, 0, accumulation, 0, world_size).rows) == size
    assert deepspeed_settings(config, world_size)["train_micro_batch_size_per_gpu"] == size


def test_what_no_number_of_ranks_mends_is_said() -> None:
    with pytest.raises(ConfigError, match=r"is 2\.4 samples at a time, .*to a multiple of train\.accumulation"):
        micro_batch_size(12, 5, 2)
    with pytest.raises(ConfigError, match="found 0 ranks; at least 1 is needed"):
        micro_batch_size(12, 1, 0)
