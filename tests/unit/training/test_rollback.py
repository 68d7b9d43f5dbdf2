"""A run goes back past a loss spike: by a real loop in one process, whose losses are multiplied at chosen batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regen_dist.config.embedder import RunConfig
from regen_dist.errors import CheckpointError, TrainingError
from regen_dist.observe.record import read_record
from regen_dist.training.embedder import EmbedderTask
from regen_dist.training.run import train
from tests.helpers.checkpoints import folder_of, newest
from tests.helpers.tiny import tiny_dataset, tiny_run

STEPS = 12
GUARD = {"action": "rollback", "window": 16, "least": 4, "threshold": 20.0, "patience": 2, "max_rollbacks": 1}
Spiky = Callable[..., None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def spiky(monkeypatch: pytest.MonkeyPatch) -> Spiky:
    """Multiplies the losses of the batches of these numbers, counted from 0 as they are trained on."""

    def plan(*numbers: int) -> None:
        clean, seen = EmbedderTask.loss, iter(range(1000))

        def loss(self: EmbedderTask, engine: Any, batch: Any, step: int) -> Any:
            found = clean(self, engine, batch, step)
            return found._replace(value=found.value * (1000.0 if next(seen) in numbers else 1.0))

        monkeypatch.setattr(EmbedderTask, "loss", loss)

    return plan


def _config(tmp_path: Path, data: Path, **changes: Any) -> RunConfig:
    values = {"train__steps": STEPS, "checkpoint__every": 2, "train__trace_samples": True, "guards__spike": GUARD}
    return tiny_run(tmp_path, data, **{**values, **changes})


def test_a_run_goes_back_and_leaves_the_spike_out(tmp_path: Path, data: Path, spiky: Spiky) -> None:
    """Steps 7 and 8 are the spike; the update of step 6 is suspect, so the checkpoint of step 4 is gone back to. What
    was decided is in its manifest and in the pointer; record and notes hold every step once; later steps take the
    batches behind the spike."""
    spiky(6, 7)
    assert train(_config(tmp_path, data)) == 0
    run = tmp_path / "tiny"
    events = [line["event"] for line in read_record(run / "metrics.jsonl", "event")]
    assert "went back from step 8 to 4; the 4 batches between are left out" in events
    figures = read_record(run / "metrics.jsonl", "train")
    assert [line["step"] for line in figures] == list(range(1, STEPS + 1))
    assert [line["rollbacks"] for line in figures] == [0] * 4 + [1] * (STEPS - 4)
    last = newest(run)
    assert (last.step, last.rollbacks, last.state["data_shift"]) == (STEPS, [4], 4)
    assert last.state["guards"]["spikes"]["rollbacks"] == 1
    trained = [line["ids"] for line in read_record(run / "samples" / "rank-00000.jsonl", "samples")]
    spiky()
    assert train(_config(tmp_path, data, name="straight", train__steps=STEPS + 4)) == 0
    order = [line["ids"] for line in read_record(tmp_path / "straight/samples/rank-00000.jsonl", "samples")]
    assert trained == order[:4] + order[8:]


@pytest.mark.parametrize("budget", [0, 1])
def test_the_budget_of_rollbacks(tmp_path: Path, data: Path, spiky: Spiky, budget: int) -> None:
    """One rollback more than allowed ends the run with its own code, and a word on what to do. What was decided before
    is kept: the pointer stays where the run went back to, or where it was."""
    spiky(6, 7, 10, 11)
    told = rf"back {budget} times already, guards\.spike\.max_rollbacks allows {budget}\. Lower"
    with pytest.raises(TrainingError, match=told) as caught:
        train(_config(tmp_path, data, guards__spike=GUARD | {"max_rollbacks": budget}))
    assert caught.value.exit_code == 6
    folder = folder_of(tmp_path / "tiny")
    assert newest(tmp_path / "tiny").rollbacks == [4] * budget
    assert folder.pointer() == 6


def test_nothing_to_go_back_to(tmp_path: Path, data: Path, spiky: Spiky) -> None:
    """Told as what it is, and nothing is changed."""
    spiky(6, 7)
    with pytest.raises(CheckpointError, match="no checkpoint before step 6 to go back to; save more often"):
        train(_config(tmp_path, data, checkpoint__every=100))
    assert folder_of(tmp_path / "tiny").steps() == []
