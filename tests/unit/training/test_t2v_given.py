"""Rows that are trained with frames given clean: which ones, what the model sees of them, and what counts as loss."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from regen_dist.config.t2v import FlowConfig
from regen_dist.data.loading.plan import sample_keys
from regen_dist.diffusion.noise import latent_gaussian
from regen_dist.diffusion.samplers import GivenFrames, draw_given_frames, error_without_given
from tests.helpers.latents import write_cache
from tests.unit.training.test_t2v import IDS, _batch, _one, _task

KEYS = sample_keys(torch.arange(3000), None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("t2v") / "cache", clips=[1, 2, 0])


def _counts(frames: int, step: int = 0, seed: int = 0, **shares: float) -> Tensor:
    """Frames given to each of the rows; they are always the first ones."""
    given = draw_given_frames(FlowConfig(**shares), seed, KEYS, step, torch.zeros(len(KEYS), 1, frames, 1, 1))
    assert given is not None
    counts = given.mask.sum(1)
    assert torch.equal(given.mask, torch.arange(frames) < counts[:, None])
    return counts


def _shares(counts: Tensor, values: Iterable[int]) -> list[float]:
    return [float((counts == value).float().mean()) for value in values]


class TestWhichFrames:
    """By the config's shares, by (seed, step, sample) alone."""

    def test_the_shares(self) -> None:
        """Of rows of four clips: the first content, or one to three whole clips alike, or nothing."""
        counts = _counts(8, given_content=0.3, given_clips=0.3)
        found = _shares(counts, (0, 1, 2, 4, 6))
        assert found == pytest.approx([0.4, 0.3, 0.1, 0.1, 0.1], abs=0.03)
        assert sum(found) == pytest.approx(1)

    def test_one_clip_has_content_alone(self) -> None:
        """One clip at least is generated, and of an image everything."""
        assert set(_counts(2, given_content=0.5, given_clips=0.5).tolist()) == {0, 1}
        assert _shares(_counts(2, given_content=0.5, given_clips=0.5), [1]) == pytest.approx([0.5], abs=0.03)
        assert not _counts(1, given_content=0.5, given_clips=0.5).any()
        assert (_counts(2, given_content=1.0) == 1).all()
        assert (_counts(4, given_clips=1.0) == 2).all()

    def test_off_by_default(self) -> None:
        assert draw_given_frames(FlowConfig(), 0, KEYS, 0, torch.zeros(len(KEYS), 1, 2, 1, 1)) is None

    def test_keyed_by_seed_step_and_sample(self) -> None:
        share = {"given_content": 0.5}
        first = _counts(2, **share)
        assert torch.equal(first, _counts(2, **share))
        for other in (_counts(2, step=1, **share), _counts(2, seed=1, **share), first.roll(1)):
            assert 0.4 < float((first == other).float().mean()) < 0.6

    def test_shares_of_more_than_all_rows_are_refused(self) -> None:
        with pytest.raises(ValidationError, match=r"0\.7 \+ given_clips 0\.6 is more than all rows"):
            FlowConfig(given_content=0.7, given_clips=0.6)


class TestLoss:
    """What is given is seen clean, at the time of clean data, and is no part of the loss."""

    @pytest.mark.parametrize("clips", [0, 1, 2])
    @torch.no_grad()
    def test_of_a_sample_does_not_depend_on_its_batch(self, cache: Path, clips: int) -> None:
        """So neither on ranks nor on accumulation: each row decides for itself and has the same weight."""
        task, engine = _task(cache, diffusion__given_content=0.4, diffusion__given_clips=0.4)
        batch = _batch(clips)
        for step in range(3):
            alone = [task.loss(engine, _one(batch, row), step).value for row in (2, 0, 3, 1)]
            together = task.loss(engine, batch, step).value
            torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)

    @torch.no_grad()
    def test_what_the_model_sees(self, cache: Path) -> None:
        """The given content bit for bit at time 0; motion as noisy, and as late, as without it."""
        seen: list[tuple[Tensor, Tensor]] = []

        def engine(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            seen.append((x, t))
            return torch.zeros_like(x)

        batch, losses = _batch(1), []
        for share in (0.0, 1.0):
            task, _ = _task(cache, diffusion__given_content=share)
            losses.append(float(task.loss(engine, batch, 7).value))
        (plain, t), (x, times) = seen
        x0 = task._normalised(batch).frames
        assert torch.equal(x[:, :, 0], x0[:, :, 0])
        assert torch.equal(x[:, :, 1], plain[:, :, 1])
        assert torch.equal(times, torch.stack([torch.zeros(4), t], 1))
        noise = latent_gaussian(3, batch.keys, 2, 8, (4, 4), draw=7)
        assert losses[1] == pytest.approx(float((noise - x0)[:, :, 1].square().mean()), rel=1e-5)
        assert losses[0] == pytest.approx(float((noise - x0).square().mean()), rel=1e-5)

    def test_given_frames_have_no_gradient(self) -> None:
        """Rows of which much or nothing is given count alike."""
        mask = torch.tensor([[True, True, True, False], [False] * 4])
        prediction = torch.randn(2, 3, 4, 2, 2, requires_grad=True)
        target = torch.zeros_like(prediction)
        loss = error_without_given(prediction, target, GivenFrames(target, mask))
        loss.backward()  # type: ignore[no-untyped-call]
        assert prediction.grad is not None
        assert not prediction.grad[0, :, :3].any()
        assert prediction.grad[0, :, 3].all()
        assert float(loss.detach()) == pytest.approx(
            float(prediction[0, :, 3].square().mean() + prediction[1].square().mean()) / 2
        )

    @torch.no_grad()
    def test_a_config_without_it_trains_as_before(self, cache: Path) -> None:
        """Times by row, and the very loss."""
        shapes: list[torch.Size] = []

        def engine(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            shapes.append(t.shape)
            return x

        task, _ = _task(cache)
        task.loss(engine, _batch(), 7)
        assert shapes == [IDS.shape]
