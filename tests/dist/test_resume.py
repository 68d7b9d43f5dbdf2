"""Resuming: bit for bit at the same number of ranks, the same state at another."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.dist.conftest import LEGS, STEPS, STOP, Runs

pytestmark = pytest.mark.timeout(1200)  # the first test waits for every run of the suite

# After the change of ranks the losses differ by the order of float32 sums alone.
ELASTIC = 1e-4
ELASTIC_BF16 = 2e-3  # and here by gradients that are rounded once more or less (tests/dist/test_zero3.py)


@pytest.mark.parametrize(
    ("resumed", "undisturbed"), [("two_to_two", "fp32"), ("two_to_two_bf16", "bf16")], ids=["fp32", "bf16"]
)
def test_resuming_is_bit_exact(runs: Runs, resumed: str, undisturbed: str) -> None:
    """Twelve steps, new processes, eight more: every loss and every piece of state (weights, both moments, EMA) equals
    that of twenty steps in one go, bit for bit."""
    assert torch.equal(runs.losses(resumed), runs.losses(undisturbed))
    after, expected = runs.tensors(resumed), runs.tensors(undisturbed)
    assert after.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(after[name], expected[name])]
    assert not different
    assert any((runs.tensors(resumed, STOP)[name] != expected[name]).any() for name in expected)


def test_the_resumed_run_really_started_anew(runs: Runs) -> None:
    """The record tells both starts, and that the second one went on at the step where the first one stopped."""
    lines = [json.loads(line) for line in (runs.folder / "two_to_two" / "metrics.jsonl").read_text().splitlines()]
    starts = [(line["step"], line["world_size"]) for line in lines if line.get("event") == "start"]
    assert starts == [(0, 2), (STOP, 2)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loading_gathers_to_the_very_same_tensors(runs: Runs, world_size: int) -> None:
    """A checkpoint of two ranks, loaded by one, two and four: what the ranks hold then, put together, is what was
    saved, bit for bit: weights, both moments, EMA. No rank holds another's part."""
    ranks, saved = runs.loaded[world_size], runs.tensors("halted", STOP)
    assert len(ranks) == world_size
    for pieces in ranks:
        assert pieces.keys() == saved.keys()
    for name, whole in saved.items():
        np.testing.assert_array_equal(np.concatenate([pieces[name] for pieces in ranks]), whole.flatten(), err_msg=name)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("two_to_one", (2, 1)), ("one_to_two", (1, 2)), ("two_to_four", (2, 4)), ("around", (4, 2))],
)
def test_resuming_at_another_number_of_ranks(runs: Runs, name: str, ranks: tuple[int, int]) -> None:
    """Saved by two and resumed by one, by four, the other way round, and around (two, one, four, two): the global batch
    of every step is the same, and the losses follow those of the undisturbed run."""
    folder, before = runs.folder / name / "checkpoints", LEGS[4] if name == "around" else STOP
    saved = [json.loads((folder / f"step-{step:08d}" / "manifest.json").read_text()) for step in (before, STEPS)]
    assert tuple(manifest["topology"]["world_size"] for manifest in saved) == ranks
    assert runs.batches(name) == runs.batches("fp32")
    torch.testing.assert_close(runs.losses(name), runs.losses("fp32"), rtol=0, atol=ELASTIC)


def test_batches_differ_from_step_to_step(runs: Runs) -> None:
    """Negative control: a run that took up its data at another place would have other batches."""
    batches = runs.batches("fp32")
    assert len(batches) == STEPS
    assert all(len(batch) == 4 for batch in batches)
    assert batches[STOP:] not in [batches[start : start + STEPS - STOP] for start in range(STOP)]


def test_the_run_that_went_around_was_everywhere(runs: Runs) -> None:
    """The record tells all four starts: who trained, and from which step on."""
    lines = [json.loads(line) for line in (runs.folder / "around" / "metrics.jsonl").read_text().splitlines()]
    starts = [(line["step"], line["world_size"]) for line in lines if line.get("event") == "start"]
    assert starts == [(0, 2), (LEGS[2], 1), (LEGS[1], 4), (LEGS[4], 2)]


def test_bf16_weights_are_loaded_at_another_number_of_ranks(runs: Runs) -> None:
    """What the forward pass gathers is made anew from the masters: in bf16 it is another tensor than they are."""
    resumed, expected = runs.losses("two_to_one_bf16"), runs.losses("bf16")
    torch.testing.assert_close(resumed, expected, rtol=0, atol=ELASTIC_BF16)


def test_the_gathered_state_does_not_depend_on_who_saved_it(runs: Runs) -> None:
    """A checkpoint of two ranks and one of a single rank hold the same tensors, once gathered."""
    two, one = runs.tensors("halted", STOP), runs.tensors("halted_one", STOP)
    assert two.keys() == one.keys()
    for name in two:
        assert two[name].shape == one[name].shape
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=ELASTIC)


def test_a_wrong_state_would_show(runs: Runs) -> None:
    """Negative control: the same resume with the moments forgotten leaves the tolerance at once, so that the tests
    above can fail."""
    forgetful, expected = runs.losses("two_to_one_forgetful"), runs.losses("fp32")
    assert forgetful[STOP] == pytest.approx(float(expected[STOP]), abs=ELASTIC), "its weights are the right ones"
    assert (forgetful[STOP + 1 :] - expected[STOP + 1 :]).abs().max() > 10 * ELASTIC
