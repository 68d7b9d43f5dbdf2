"""Text to video's task: losses of samples, dropped texts, previews, and rows with frames given clean."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from regen_dist.config.t2v import FlowConfig
from regen_dist.data.loading.latent_loader import LatentBatch
from regen_dist.data.loading.plan import sample_keys
from regen_dist.diffusion.noise import latent_gaussian
from regen_dist.diffusion.samplers import GivenFrames, draw_given_frames, error_without_given
from regen_dist.distributed.engine import PlainEngine
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError, DataError
from regen_dist.inference.generation_settings import trained_sizes
from regen_dist.inference.latent_space import parse_statistics, read_space
from regen_dist.training.run import build_task
from regen_dist.training.t2v import TextToVideoTask
from tests.helpers.checkpoints import saved_run
from tests.helpers.latents import write_cache
from tests.helpers.t2v import cache_for
from tests.helpers.tiny import tiny_t2v, wake

CPU = torch.device("cpu")
IDS = torch.tensor([5, 17, 2**40, 3])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("t2v") / "cache", clips=[1, 2, 0])


def _task(cache: Path, output: Path | str = "runs", **changes: Any) -> tuple[Any, PlainEngine]:
    config = tiny_t2v(output, cache, **changes)
    task = build_task(config, CPU)
    engine = PlainEngine(config, Ranks(), task.build)
    wake(engine.module)
    return task, engine


def _batch(clips: int = 2, tokens: int = 5) -> LatentBatch:
    """Four rows; each text has one token less than the one before."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(4, max(clips, 1), 8, 4, 4, generator=generator)
    motion = torch.randn(4, clips, 8, 4, 4, generator=generator)
    mask = torch.arange(tokens) < tokens - torch.arange(4)[:, None]
    text = torch.randn(4, tokens, 16, generator=generator) * mask[..., None]
    return LatentBatch(content, motion, text, mask, IDS)


def _one(batch: LatentBatch, row: int) -> LatentBatch:
    """A row alone, its text without padding."""
    tokens = int(batch.mask[row].sum())  # type: ignore[index]
    return LatentBatch(
        batch.content[row, None], batch.motion[row, None], batch.text[row, None, :tokens],  # type: ignore[index]
        batch.mask[row, None, :tokens], batch.sample_ids[row, None],  # type: ignore[index]
    )  # fmt: skip


@torch.no_grad()
def test_randomness_is_keyed_by_seed_step_and_sample(cache: Path) -> None:
    """The same step again gives the same loss; another step, seed, sample id or epoch another one."""
    task, engine = _task(cache)
    batch = _batch()
    loss = task.loss(engine, batch, 7).value
    assert torch.equal(task.loss(engine, batch, 7).value, loss)
    assert not torch.equal(task.loss(engine, batch, 8).value, loss)
    assert not torch.equal(task.loss(engine, batch._replace(sample_ids=IDS + 1), 7).value, loss)
    assert not torch.equal(task.loss(engine, batch._replace(epochs=torch.ones_like(IDS)), 7).value, loss)
    other, _ = _task(cache, train__seed=4)
    assert not torch.equal(other.loss(engine, batch, 7).value, loss)


def test_a_model_that_knows_the_latents_has_no_loss(cache: Path) -> None:
    """The target is the velocity from the normalised latents to the noise: an oracle, which finds them by x_t and t,
    has a loss of zero; one that predicts nothing has their power and the noise's."""
    task, _ = _task(cache)
    batch = _batch()
    x0 = task._normalised(batch).frames

    def oracle(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return (x - x0) / t.view(-1, 1, 1, 1, 1)

    assert float(task.loss(oracle, batch, 7).value) < 1e-6
    nothing = float(task.loss(lambda x, t, text, mask: torch.zeros_like(x), batch, 7).value)
    assert nothing == pytest.approx(1 + float(x0.square().mean()), rel=0.1)


class TestDroppedTexts:
    """A share of the samples is trained with the empty caption of the caches."""

    @torch.no_grad()
    def test_all_and_none(self, cache: Path) -> None:
        """When all are dropped the captions change nothing; when none is, they do."""
        batch = _batch()
        other = batch._replace(text=batch.text.flip(0), mask=batch.mask.flip(0))  # type: ignore[union-attr]
        for rate, same in ((1.0, True), (0.0, False)):
            task, engine = _task(cache, data__text_dropout=rate)
            losses = [task.loss(engine, each, 7).value for each in (batch, other)]
            assert torch.equal(*losses) == same

    def test_the_share_and_what_takes_their_place(self, cache: Path) -> None:
        """About the share that is asked for, drawn anew at each step, sample by sample; a dropped text is the empty
        caption, with its mask."""
        seen: list[tuple[Tensor, Tensor]] = []
        task, _ = _task(cache, data__text_dropout=0.3)

        def engine(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            seen.append((text, mask))
            return x

        batch = _batch()
        for step in range(75):
            task.loss(engine, batch, step)
        null = read_space_null(task)
        dropped = torch.stack([mask.sum(1) == len(null) for _, mask in seen])  # texts have two tokens and more
        assert float(dropped.float().mean()) == pytest.approx(0.3, abs=5 * (0.21 / 300) ** 0.5)
        assert len({tuple(row.tolist()) for row in dropped}) > 10
        for (text, _), chosen in zip(seen, dropped, strict=True):
            assert torch.equal(text[chosen][:, 0], null.expand(int(chosen.sum()), -1))
            assert not text[chosen][:, 1:].any()
            assert torch.equal(text[~chosen], batch.text[~chosen])  # type: ignore[index]


def read_space_null(task: Any) -> Tensor:
    """The empty caption's embedding, [1, D]."""
    null = task.data.null_text()
    assert null is not None
    text: Tensor = null.text
    return text


class TestCaches:
    """A model is trained on caches that fit it."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model__text_width": 8}, r"model\.text_width is 8, .* width of 16; set model\.text_width=16"),
            (
                {"model__latent_channels": 4},
                r"model\.latent_channels is 4, .* have 8 channels; set model\.latent_channels=8",
            ),
        ],
    )
    def test_widths(self, cache: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            _ = build_task(tiny_t2v("runs", cache, **changes), CPU).data

    def test_no_text(self, tmp_path: Path) -> None:
        bare = write_cache(tmp_path / "cache", text_width=None)
        with pytest.raises(DataError, match="holds no text embeddings; run `regen preencode` with a text encoder"):
            _ = build_task(tiny_t2v("runs", bare), CPU).data

    def test_the_latent_space_is_noted_in_the_run(self, tmp_path: Path) -> None:
        """Before the first batch, by rank 0 alone: the statistics of all caches together, and the empty caption of the
        first. A second start leaves the files as they are."""
        one, two = (write_cache(tmp_path / f"cache{seed}", seed=seed, clips=[1, 0]) for seed in (1, 2))
        config = tiny_t2v(tmp_path, data={"mixture": [{"url": str(one)}, {"url": str(two)}]})
        task = TextToVideoTask(config, CPU)
        task.batches(Ranks(1, 2), 0).close()
        assert not (config.folder / "latent_space").exists()
        task.batches(Ranks(), 0).close()
        space = read_space(config.folder)
        parts = [parse_statistics(each, "test") for each in task.data.statistics]
        assert space.statistics.to_text() == (parts[0] + parts[1]).to_text()
        assert space.statistics.images.num_clips == 16  # type: ignore[union-attr]
        assert torch.equal(space.null_text.text, read_space_null(task))
        assert (space.num_frames, space.fps) == (5, 8.0)
        assert trained_sizes(space) == [(32, 32)]  # of the videos, though they were encoded without buckets
        before = {path.name: path.stat().st_mtime_ns for path in (config.folder / "latent_space").iterdir()}
        TextToVideoTask(config, CPU).batches(Ranks(), 0).close()
        assert before == {path.name: path.stat().st_mtime_ns for path in (config.folder / "latent_space").iterdir()}


class TestValidation:
    """Fixed rows at fixed times; videos where an embedder is given."""

    def test_the_loss(self, cache: Path) -> None:
        """The same at each call, whatever was trained on; images are validated where there is nothing else."""
        task, engine = _task(cache, data__clips=(2,))
        first, again = (task.validate(engine) for _ in range(2))
        assert first.figures == again.figures
        assert 0 < first.figures["loss"] < 10
        assert (first.made, first.captions) == (None, ())
        wake(engine.module, 1)
        with torch.no_grad():
            next(engine.module.parameters()).mul_(2)
        assert task.validate(engine).figures != first.figures

    def test_videos_of_an_embedder(self, tmp_path: Path) -> None:
        """From the captions of validation data: as many as asked for, decoded at the length and sides of its rows;
        beside them the decoded latents of the source. On rank 0 alone."""
        embedder = saved_run(tmp_path)
        cache = cache_for(embedder, tmp_path / "cache", clips=2, size=(32, 48))
        task, engine = _task(
            cache, tmp_path, model__text_width=4, data__clips=(2,), generation__embedder=str(embedder.folder),
            generation__prompts=2,
        )  # fmt: skip
        found = task.validate(engine)
        assert found.made.shape == found.source.shape == (2, 3, 10, 32, 48)
        assert not torch.allclose(found.made, found.source, atol=0.05)
        assert (len(found.captions), found.captions[0]) == (2, "a red square")
        assert (found.label, found.fps) == ("generated", 8.0)
        met: list[int] = []
        assert torch.equal(task.validate(engine, lambda: met.append(0)).made, found.made)
        engine.ranks = Ranks(1, 2)
        assert task.validate(engine, lambda: met.append(1))._replace(figures={}) == type(found)({})
        assert met == [0] * 4 + [1] * 4, "the other ranks wait for each video"

    def test_rank_0_alone_reads_the_embedder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is wrong with it is an error of all ranks, by a collective."""
        embedder = saved_run(tmp_path)
        cache = cache_for(embedder, tmp_path / "cache", clips=2, size=(32, 48))
        task, engine = _task(cache, tmp_path, model__text_width=4, generation__embedder=str(embedder.folder))
        monkeypatch.setattr(Ranks, "on_main", lambda self, job: job() if self.is_main else None)
        task.read_validation(Ranks(1, 2))
        engine.ranks = Ranks(1, 2)
        task.validate(engine)
        assert "_codec" not in task.__dict__
        task.read_validation(Ranks(0, 2))
        assert "_codec" in task.__dict__

    def test_another_embedder_is_refused(self, tmp_path: Path) -> None:
        embedder = saved_run(tmp_path)
        task, engine = _task(write_cache(tmp_path / "cache"), tmp_path, generation__embedder=str(embedder.folder))
        with pytest.raises(CheckpointError, match="is not the one that the latents were made with"):
            task.validate(engine)


def test_flops_grow_with_the_row(cache: Path) -> None:
    """What the figures of speed divide by: rows of two clips cost more than images."""
    task, _ = _task(cache)
    assert task.flops(_batch(0)) < task.flops(_batch(2)) / 3


def test_every_rank_builds_the_same_model(cache: Path) -> None:
    """The initial weights are a function of the seed alone."""
    states = []
    for seed in (3, 3, 4):
        torch.rand(5)
        states.append(build_task(tiny_t2v("runs", cache, train__seed=seed), CPU).build().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


# Rows that are trained with frames given clean: which ones, what the model sees of them, and what counts as loss.


KEYS = sample_keys(torch.arange(3000), None)


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
        """So neither on ranks nor on accumulation: a batch of four rows (of images, of one clip, of two) has the mean
        loss of four batches of one in any order. Noise, timestep, whether the text is dropped and what is given belong
        to the sample; padding of texts does not count."""
        task, engine = _task(cache, data__text_dropout=0.4, diffusion__given_content=0.4, diffusion__given_clips=0.4)
        batch = _batch(clips)
        for step in range(3):
            alone = [task.loss(engine, _one(batch, row), step).value for row in (2, 0, 3, 1)]
            together = task.loss(engine, batch, step).value
            torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)
            assert torch.stack(alone).std() > 1e-3

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
