"""Guards in real runs of one process: a return past a loss spike, and checkpoints kept from before broken weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.checkpoint.saver import Saver
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.run import CheckpointConfig
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError, RegenError, TrainingError
from regen_dist.inference.codec import Codec
from regen_dist.inference.export import ExportOptions, export_model
from regen_dist.observe.record import read_record
from regen_dist.training import loop
from regen_dist.training.embedder import EmbedderTask
from regen_dist.training.run import train
from tests.helpers.checkpoints import folder_of, newest, write_checkpoint
from tests.helpers.tiny import tiny_run

STEPS = 12
GUARD = {"action": "rollback", "window": 16, "least": 4, "threshold": 20.0, "patience": 2, "max_rollbacks": 1}
Spiky = Callable[..., None]


@pytest.fixture(scope="module")
def data(tiny_shards: Path) -> Path:
    return tiny_shards


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


def _spike_config(tmp_path: Path, data: Path, **changes: Any) -> EmbedderConfig:
    values = {"train__steps": STEPS, "checkpoint__every": 2, "train__trace_samples": True, "guards__spike": GUARD}
    return tiny_run(tmp_path, data, **{**values, **changes})


def test_a_run_goes_back_and_leaves_the_spike_out(tmp_path: Path, data: Path, spiky: Spiky) -> None:
    """Steps 7 and 8 are the spike; the update of step 6 is suspect, so the checkpoint of step 4 is gone back to. What
    was decided is in its manifest and in the pointer; record and notes hold every step once; later steps take the
    batches behind the spike."""
    spiky(6, 7)
    assert train(_spike_config(tmp_path, data)) == 0
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
    assert train(_spike_config(tmp_path, data, name="straight", train__steps=STEPS + 4)) == 0
    order = [line["ids"] for line in read_record(tmp_path / "straight/samples/rank-00000.jsonl", "samples")]
    assert trained == order[:4] + order[8:]


@pytest.mark.parametrize("budget", [0, 1])
def test_the_budget_of_rollbacks(tmp_path: Path, data: Path, spiky: Spiky, budget: int) -> None:
    """One rollback more than allowed ends the run with its own code, and a word on what to do. What was decided before
    is kept: the pointer stays where the run went back to, or where it was."""
    spiky(6, 7, 10, 11)
    told = rf"back {budget} times already, guards\.spike\.max_rollbacks allows {budget}\. Lower"
    with pytest.raises(TrainingError, match=told) as caught:
        train(_spike_config(tmp_path, data, guards__spike=GUARD | {"max_rollbacks": budget}))
    assert caught.value.exit_code == 6
    folder = folder_of(tmp_path / "tiny")
    assert newest(tmp_path / "tiny").rollbacks == [4] * budget
    assert folder.pointer() == 6


def test_nothing_to_go_back_to(tmp_path: Path, data: Path, spiky: Spiky) -> None:
    """Told as what it is, and nothing is changed."""
    spiky(6, 7)
    with pytest.raises(CheckpointError, match="no checkpoint before step 6 to go back to; save more often"):
        train(_spike_config(tmp_path, data, checkpoint__every=100))
    assert folder_of(tmp_path / "tiny").steps() == []


# A run whose weights break keeps the checkpoints from before, says so, and goes on from them.


BREAKS = 1e30  # a rate that leaves finite weights, of which no loss is finite
HEALTHY = 4


def _broken_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """A rate that breaks the weights, from the step after `steps` on."""
    clean = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda config, made, total: (
        BREAKS if made >= steps else clean(config, made, total)))  # fmt: skip


def _nonfinite_config(tmp_path: Path, data: Path, every: int = 2, **changes: Any) -> EmbedderConfig:
    return tiny_run(tmp_path, data, checkpoint__every=every, **changes)


@pytest.mark.parametrize("every", [1, 3])
def test_a_skipped_tail_is_no_success_and_keeps_what_was_good(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Weights break in step 5; every later step is skipped, and so many are saved that retention would delete all from
    before. The next start, with the rate mended, trains on from before the break, and ends well."""
    assert train(_nonfinite_config(tmp_path, data, every, train__steps=HEALTHY)) == 0
    with monkeypatch.context() as patch:
        _broken_after(patch, HEALTHY)
        with pytest.raises(TrainingError, match=r"the last 9 steps had non-finite .* goes on from step (3|4)"):
            train(_nonfinite_config(tmp_path, data, every, train__steps=14))
    run = tmp_path / "tiny"
    assert any(step <= HEALTHY for step in folder_of(run).steps())
    assert newest(run).step <= HEALTHY
    assert train(_nonfinite_config(tmp_path, data, every, train__steps=14)) == 0
    assert newest(run).step == 14
    assert newest(run).skipped_in_a_row == 0
    Codec.load(run).encode(torch.zeros(1, 3, 5, 32, 32))


def test_the_budget_of_skips_in_a_row(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run long before the budget of all skips does, and a stopped run goes on counting."""
    _broken_after(monkeypatch, 2)
    with pytest.raises(TrainingError, match=r"step 9: the last 6 steps .*nonfinite_in_a_row allows 5.*from step 2"):
        train(_nonfinite_config(tmp_path, data, train__steps=40, guards__nonfinite_in_a_row=5))


def test_a_run_that_never_made_a_step_is_no_success(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it on the second call, which has nothing to do."""
    _broken_after(monkeypatch, 0)
    config = _nonfinite_config(tmp_path, data, train__steps=6)
    for _ in range(2):
        with pytest.raises(TrainingError, match="no checkpoint from before"):
            train(config)


def test_broken_results_are_refused(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are finite, of which no latent is: neither encoded nor exported."""
    _broken_after(monkeypatch, 1)
    with pytest.raises(TrainingError):
        train(_nonfinite_config(tmp_path, data, train__steps=6))
    run = tmp_path / "tiny"
    codec = Codec.load(run, weights="plain")
    with pytest.raises(CheckpointError, match="encodes to latents that are not finite"):
        codec.encode(torch.zeros(1, 3, 5, 32, 32))
    with pytest.raises(CheckpointError, match="not finite"):
        export_model(run, tmp_path / "out", ExportOptions(weights="plain"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of four steps. Copy it, do not change it."""
    folder = tmp_path_factory.mktemp("healthy")
    assert train(_nonfinite_config(folder, data, train__steps=HEALTHY)) == 0
    return folder / "tiny"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_weights_are_no_checkpoint(tmp_path: Path, data: Path, healthy: Path, value: float) -> None:
    """One value among all: it is not saved, not resumed from, not verified, not loaded and not exported. One that an
    earlier version saved is passed over, and named."""
    run = Path(shutil.copytree(healthy, tmp_path / "tiny"))
    folder, good = folder_of(run), newest(run)
    kinds = ("master", "ema", "exp_avg", "exp_avg_sq")
    pieces = {f"{kind}/{name}": folder.reader(good).whole(f"{kind}/{name}").reshape(-1)
              for kind in kinds for name in good.shapes}  # fmt: skip
    pieces[list(pieces)[3]][-1] = value
    assert "1 of" in (problem := _saved(run, pieces))
    assert "not finite" in problem
    write_checkpoint(run, 6, pieces, good.shapes, state=good.state)
    assert "holds values that are not finite" in folder.problems(folder.manifest(6), checksums=True)[0]
    told: list[str] = []
    found = newest_good(folder, checksums=True, log=told.append)
    assert found is not None
    assert found.step == 4
    assert "not finite" in told[0]
    for use in (
        lambda: Codec.load(run, weights="plain"),
        lambda: export_model(run, tmp_path / "out", ExportOptions(6)),
    ):
        with pytest.raises(RegenError, match="not finite"):
            use()
    assert train(_nonfinite_config(tmp_path, data, train__steps=5, checkpoint__verify="sizes")) == 0


def _saved(run: Path, pieces: dict[str, torch.Tensor]) -> str:
    """Save them as step 5; what was said."""
    saver = Saver(CheckpointFolder(run / "checkpoints"), Ranks(), CheckpointConfig())
    saver.save(replace(newest(run), step=5, files={}), pieces)
    outcome = saver.settle()
    assert outcome is not None
    assert CheckpointFolder(run / "checkpoints").steps()[-1] == 4
    return outcome.problem
