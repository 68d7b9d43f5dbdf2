"""Which ranks share samples, and which of them stands for the others; what they compute is in tests/dist."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from regen_dist.distributed.ranks import Ranks
from regen_dist.distributed.sequence_parallel import RowGroup, join_rows
from regen_dist.distributed.zero3 import deepspeed_settings
from regen_dist.models.sequence_parallel import WHOLE
from tests.helpers.tiny import tiny_run


def test_consecutive_ranks_form_a_group() -> None:
    """Six ranks in groups of three: two groups that read."""
    groups = [RowGroup(Ranks(rank, 6, rank), 3) for rank in range(6)]
    assert [group.index for group in groups] == [0, 1, 2, 0, 1, 2]
    assert [group.leads for group in groups] == [True, False, False, True, False, False]
    assert [(group.readers.rank, group.readers.world_size) for group in groups] == [(0, 2)] * 3 + [(1, 2)] * 3


def test_a_rank_by_itself_is_as_before() -> None:
    """No group is made, no row is cut, and batches come as the source gives them."""
    ranks = Ranks(1, 4, 1)
    rows = join_rows(ranks, 1)

    def source() -> Generator[int]:
        yield 1

    made = source()
    assert rows.leads
    assert rows.readers is ranks
    assert rows.read(lambda: made) is made
    assert rows.share(12) is WHOLE, "models skip the exchange of a shared row by this identity"


@pytest.mark.parametrize(("length", "owned"), [(12, [(0, 4), (4, 8), (8, 12)]), (7, [(0, 3), (3, 5), (5, 7)])])
def test_parts_of_a_row(length: int, owned: list[tuple[int, int]]) -> None:
    shares = [RowGroup(Ranks(rank, 3, rank), 3).share(length) for rank in range(3)]
    assert [(share.own.start, share.own.stop) for share in shares] == owned


def test_deepspeed_counts_samples_by_rank() -> None:
    """It wants its batch to be what each rank has, times ranks and accumulation."""
    config = tiny_run(engine__kind="zero3", engine__sequence_parallel=2, train__batch_global=8, train__accumulation=2)
    settings = deepspeed_settings(config, 4)
    micro, batch = settings["train_micro_batch_size_per_gpu"], settings["train_batch_size"]
    assert (micro, batch) == (2, 16)
    assert batch == micro * 4 * settings["gradient_accumulation_steps"]
