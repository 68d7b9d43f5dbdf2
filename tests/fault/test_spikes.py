"""Losses that jump, on two ranks under ZeRO-3: the run goes back past what made them, warns, or stops."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Generator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.errors import RegenError
from regen_dist.observe.record import read_record
from tests.fault.conftest import losses
from tests.helpers.checkpoints import folder_of, newest, tensors
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_dataset, tiny_run

STEPS, EVERY = 16, 2
SPIKE = (9, 10)  # batches, counted from 0 in their order: steps 10 and 11 of a run that nothing was left out of
BACK_TO, LEFT_OUT = 8, 3  # a checkpoint from before step 9, whose update may have made step 10's loss; batches 8 to 10
ANOTHER = (14, 15)
NAN_AT, INF_AT = 9, 12
TIMES = 1000.0


class Script(NamedTuple):
    """A run, and what happens to its loss at which batches of the order."""

    config: EmbedderConfig
    spikes: tuple[int, ...] = ()
    nan_at: int | None = None  # on rank 1 alone
    inf_at: int | None = None  # on rank 0 alone, and its gradients are finite
    killed: bool = False  # right after it went back


def _play(scripts: list[Script], outcomes: Path) -> None:
    """Train one run after the other, as a rank, and note how each ended."""
    from regen_dist.distributed.ranks import process_group, read_environment
    from regen_dist.training import run

    ranks = read_environment()
    run.process_group = lambda ranks, needed: nullcontext()  # type: ignore[assignment,misc]
    with process_group(ranks, needed=True):
        for script in scripts:
            with pytest.MonkeyPatch.context() as patch:
                _rewrite(patch, script, ranks.rank)
                try:
                    outcome = [run.train(script.config), ""]
                except RegenError as error:
                    outcome = [error.exit_code, str(error)]
            (outcomes / f"{script.config.name}-{ranks.rank}.json").write_text(json.dumps(outcome))


def _rewrite(patch: pytest.MonkeyPatch, script: Script, rank: int) -> None:
    from regen_dist.training import embedder, loop
    from regen_dist.training.embedder import EmbedderTask

    clip_batches, clean_loss, went_back = embedder.clip_batches, EmbedderTask.loss, loop.Trainer._roll_back
    place = 0

    def batches(data: Any, *, cursor: int, **others: Any) -> Generator[Any]:
        nonlocal place
        with closing(clip_batches(data, cursor=cursor, **others)) as found:
            for place, batch in enumerate(found, cursor // script.config.train.batch_global):  # noqa: B007 - for `loss`
                yield batch

    def loss(self: EmbedderTask, engine: Any, batch: Any, step: int) -> Any:
        found = clean_loss(self, engine, batch, step)
        if place in script.spikes:
            return found._replace(value=found.value * TIMES)
        if (place, rank) == (script.nan_at, 1):
            return found._replace(value=found.value * torch.nan)
        if (place, rank) == (script.inf_at, 0):
            return found._replace(value=found.value + torch.inf)
        return found

    def going_back(self: loop.Trainer, spike: Any) -> None:
        went_back(self, spike)
        if script.killed:
            os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(embedder, "clip_batches", batches)
    patch.setattr(EmbedderTask, "loss", loss)
    patch.setattr(loop.Trainer, "_roll_back", going_back)


class Made(NamedTuple):
    """Finished runs by their names; `left` is a copy of `killed` as it was found."""

    folder: Path

    def outcomes(self, name: str) -> list[list[Any]]:
        """Exit code and error of each rank."""
        return [json.loads((self.folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]

    def events(self, name: str) -> list[str]:
        """Return the events of a run's record."""
        return [line["event"] for line in read_record(self.folder / name / "metrics.jsonl", "event")]

    def batches(self, name: str) -> list[list[int]]:
        """The samples of every step; fails when a rank noted a step twice or not at all."""
        notes = [read_record(self.folder / name / "samples" / f"rank-{rank:05d}.jsonl", "samples") for rank in range(2)]
        assert all([line["step"] for line in lines] == list(range(1, len(notes[0]) + 1)) for lines in notes)
        return [[sample for line in lines for sample in line["ids"]] for lines in zip(*notes, strict=True)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All runs of this file by two starts of two ranks; the second resumes the one that was killed."""
    folder = tmp_path_factory.mktemp("spikes")
    data = tiny_dataset(folder / "data")
    guard = {"action": "rollback", "window": 16, "least": 6, "threshold": 20.0, "patience": 2, "max_rollbacks": 1}

    def config(name: str, *, action: str = "rollback", **changes: Any) -> EmbedderConfig:
        values = {
            "engine__kind": "zero3", "train__steps": STEPS, "train__trace_samples": True, "checkpoint__every": EVERY,
            "checkpoint__keep_last": STEPS, "guards__spike": {**guard, "action": action},
        }  # fmt: skip
        return tiny_run(folder, data, name=name, **{**values, **changes})

    killed = Script(config("killed"), SPIKE, killed=True)
    scripts = [
        Script(config("warned", action="warn", train__steps=STEPS + LEFT_OUT), SPIKE),
        Script(config("went_back"), SPIKE),
        Script(config("twice"), (*SPIKE, *ANOTHER)),
        Script(config("poisoned", checkpoint__every=1), nan_at=NAN_AT, inf_at=INF_AT),
    ]
    with pytest.raises(RuntimeError, match="without a result"):
        run_ranks(_play, 2, [*scripts, killed], folder, timeout_s=280.0)
    shutil.copytree(folder / "killed", folder / "left")
    run_ranks(_play, 2, [killed._replace(killed=False)], folder)
    return Made(folder)


def test_a_spike_is_gone_back_from_and_its_batches_are_left_out(made: Made) -> None:
    """All ranks go back together to a checkpoint from before the spike; from there on each step has the batch that
    lies so many further in the order; record and notes hold every step once; the run finishes."""
    assert made.outcomes("went_back") == [[0, ""], [0, ""]]
    order, trained = made.batches("warned"), made.batches("went_back")
    assert len(trained) == STEPS
    assert trained == order[:BACK_TO] + order[BACK_TO + LEFT_OUT :]
    assert trained != order[:STEPS], "batches differ"
    figures = read_record(made.folder / "went_back" / "metrics.jsonl", "train")
    assert max(losses(made.folder / "went_back")) < 10.0, "no spike is left in the record"
    assert [line["rollbacks"] for line in figures] == [0] * BACK_TO + [1] * (STEPS - BACK_TO)
    said = [text for text in made.events("went_back") if "spike" in text or "went back" in text]
    assert said[0].startswith("warning: loss spike in steps 10 to 11: the loss is ")
    assert said[1:] == ["went back from step 11 to 8; the 3 batches between are left out"]
    last = newest(made.folder / "went_back")
    assert (last.step, last.rollbacks, last.state["data_shift"]) == (STEPS, [BACK_TO], LEFT_OUT)


def test_a_run_that_is_killed_after_it_went_back_stays_there(made: Made) -> None:
    """SIGKILL before anything more was saved: what was decided is in the checkpoint that it went back to; resumed, it
    ends as the run that was not killed, bit for bit."""
    left = newest(made.folder / "left")
    assert (left.step, left.rollbacks, left.state["data_shift"]) == (BACK_TO, [BACK_TO], LEFT_OUT)
    assert left.state["guards"]["spikes"]["rollbacks"] == 1
    assert made.outcomes("killed") == [[0, ""], [0, ""]]
    assert made.batches("killed") == made.batches("went_back")
    assert losses(made.folder / "killed") == losses(made.folder / "went_back")
    expected, found = (tensors(made.folder / name, STEPS) for name in ("went_back", "killed"))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_what_was_saved_after_the_spike_is_not_gone_on_from(made: Made) -> None:
    """The checkpoint of step 10, whose loss was the first of the spike, was committed before it was gone back from."""
    left = folder_of(made.folder / "left")
    assert 10 in left.steps()
    assert not left.manifest(10).is_followed_by(left.manifest(BACK_TO))
    assert left.manifest(10).rollbacks == []
    assert folder_of(made.folder / "killed").manifest(10).rollbacks == [BACK_TO], "made anew"


def test_too_many_rollbacks_stop_the_run(made: Made) -> None:
    """With its own exit code, on every rank alike, at the second spike where one is allowed."""
    first, second = made.outcomes("twice")
    assert first == second
    assert first[0] == 6
    assert first[1].startswith("loss spike in steps 12 to 13: ")
    assert "guards.spike.max_rollbacks allows 1" in first[1]


def test_a_spike_may_only_be_warned_of(made: Made) -> None:
    """Once, and the run goes on with every batch in its order."""
    assert made.outcomes("warned") == [[0, ""], [0, ""]]
    assert len([text for text in made.events("warned") if "loss spike in steps 10 to 11" in text]) == 1
    assert not [text for text in made.events("warned") if "went back" in text]
    found = losses(made.folder / "warned")
    assert [step for step, loss in enumerate(found) if loss > 10.0] == list(SPIKE)
    assert newest(made.folder / "warned").state["data_shift"] == 0


@pytest.mark.parametrize("bad", [NAN_AT, INF_AT])
def test_a_loss_that_is_not_finite_is_skipped_and_no_spike(made: Made, bad: int) -> None:
    """NaN on rank 1 alone, and on rank 0 alone an infinity with finite gradients: no rank changes anything in that
    step; it is counted; it is no spike, and the window never sees it."""
    assert made.outcomes("poisoned") == [[0, ""], [0, ""]]
    run = made.folder / "poisoned"
    before, after, later = (tensors(run, step) for step in (bad, bad + 1, bad + 2))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name in after if not torch.equal(after[name], later[name])] != []
    states = [folder_of(run).manifest(step).state for step in (bad, bad + 1, STEPS)]
    windows = [state["guards"]["spikes"]["windows"] for state in states]
    assert windows[0] == windows[1]
    assert all(torch.tensor(window).isfinite().all() for each in windows for window in each.values())
    assert [state["guards"]["nonfinite"]["skipped"] for state in states] == [bad > NAN_AT, 1 + (bad > NAN_AT), 2]
    assert states[2]["num_updates"] == STEPS - 2
    assert not [text for text in made.events("poisoned") if "spike" in text]
