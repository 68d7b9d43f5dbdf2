"""A run resumes only where its checkpoint belongs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from regen_dist.config import load_saved_config
from regen_dist.errors import CheckpointError, NoGoodCheckpoint
from regen_dist.training.run import train
from tests.helpers.tiny import tiny_dataset, tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train__seed": 4}, r"train\.seed was 3, is 4"),
        ({"train__batch_global": 8}, r"train\.batch_global was 4, is 8"),
        ({"model__decoder__blocks": 1}, "saved by another model"),
    ],
)
def test_changed_data_order_or_model_is_refused_and_named(
    tmp_path: Path, data: Path, changes: dict[str, Any], told: str
) -> None:
    """Going on would train on other clips, or put weights where they do not belong, without a word. The run keeps
    its own config, which its checkpoint is read by."""
    first = tiny_run(tmp_path, data, train__steps=1)
    assert train(first) == 0
    with pytest.raises(CheckpointError, match=told):
        train(tiny_run(tmp_path, data, train__steps=2, **changes))
    assert load_saved_config(first.folder) == first


def test_more_steps_go_on_from_the_checkpoint(tmp_path: Path, data: Path) -> None:
    """What may change does: the same run with more steps goes on, and does not start again."""
    assert train(tiny_run(tmp_path, data, train__steps=1)) == 0
    assert train(tiny_run(tmp_path, data, train__steps=2)) == 0
    record = (tmp_path / "tiny" / "metrics.jsonl").read_text()
    assert record.count('"kind": "train"') == 2


def test_a_folder_of_checkpoints_that_is_gone_is_no_new_run(tmp_path: Path, data: Path) -> None:
    """Not mounted, or emptied: the record tells that there was a checkpoint, so starting from scratch must be asked
    for."""
    config = tiny_run(tmp_path, data, train__steps=1)
    assert train(config) == 0
    shutil.rmtree(config.folder / "checkpoints")
    with pytest.raises(NoGoodCheckpoint, match=r"metrics\.jsonl records a checkpoint of step 1, .* mounted.*--fresh"):
        train(config)
    assert train(config, fresh=True) == 0
    assert train(config) == 0
