"""Division of a global batch: one answer for config, data order and DeepSpeed; and ranks that share rows of tokens."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from regen_dist.config.identity import clips_per_rank, micro_batch_size, num_readers
from regen_dist.data.order.order import DataOrder
from regen_dist.distributed.zero3 import deepspeed_settings
from regen_dist.errors import ConfigError
from tests.helpers.tiny import tiny_run, tiny_t2v


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


# What a config may say of ranks that share rows of tokens.


SHARED: dict[str, Any] = {"engine__kind": "zero3", "engine__sequence_parallel": 2}


@pytest.mark.parametrize(
    ("make", "changes", "says"),
    [
        (tiny_run, {"engine__sequence_parallel": 2}, r"kind 'plain'.*set engine\.kind=zero3"),
        (tiny_t2v, {"engine__sequence_parallel": 2}, r"kind 'plain'.*set engine\.kind=zero3"),
        (tiny_run, {**SHARED, "model__kind": "magvit2"}, r"baseline has no row.*set engine\.sequence_parallel=1"),
        (
            tiny_run,
            {**SHARED, "engine__sequence_parallel": 4, "model__decoder__heads": 2},
            r"4 does not divide model\.decoder\.heads 2.*one of 1, 2",
        ),
        (tiny_t2v, {**SHARED, "engine__sequence_parallel": 3}, r"3 does not divide model\.heads 2.*one of 1, 2"),
    ],
)
def test_what_cannot_be_shared_is_refused(make: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make(**changes)


@pytest.mark.parametrize(("world_size", "clips"), [(2, 4), (4, 2), (8, 1)])
def test_a_group_counts_as_one(world_size: int, clips: int) -> None:
    """Four samples at a time, of two micro-batches of a step of eight."""
    config = tiny_run(train__batch_global=8, train__accumulation=2, **SHARED)
    assert clips_per_rank(config, world_size) == clips
    assert num_readers(config, world_size) == world_size // 2


def test_ranks_that_make_no_groups() -> None:
    with pytest.raises(ConfigError, match=r"sequence_parallel 2 groups ranks, and 3 ranks are no multiple"):
        clips_per_rank(tiny_run(**SHARED), 3)


def test_groups_that_do_not_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match=r"6 ranks in groups of 2 .*ranks that fit: 2, 4, 8$"):
        clips_per_rank(tiny_run(**SHARED), 6)
