"""How ZeRO-3 cuts its work changes nothing of what a run learns; real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.comeback import ending, small_run, train
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_dataset


def test_sub_groups_second_copies_and_prefetch_change_no_loss(tmp_path: Path) -> None:
    """hpZ's copies are those of before where a checkpoint is loaded into an engine that has validated: they are made
    anew. Four ranks, two of each node."""
    data = tiny_dataset(tmp_path / "data")
    runs = {
        "as-it-is": {},
        "tuned": {
            "engine__zero__partition_size": 2, "engine__zero__sub_group": 2000, "engine__zero__prefetch_bucket": 1000,
            "engine__zero__communication_dtype": "fp32", "train__validate_at_start": True,
        },
    }  # fmt: skip
    losses = {}
    for name, changes in runs.items():
        config = small_run(tmp_path, data, name, train__steps=2, train__batch_global=4, **changes)
        assert run_ranks(train, 4, config) == [0] * 4
        longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
        assert run_ranks(train, 4, longer) == [0] * 4
        losses[name] = ending(longer).losses
    assert losses["tuned"] == pytest.approx(losses["as-it-is"], rel=1e-5)
