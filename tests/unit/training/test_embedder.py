"""The losses: functions of (seed, step, sample id), not of the batch that a sample is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.distributed.engine import PlainEngine
from regen_dist.distributed.ranks import Ranks
from regen_dist.training.embedder import latent_noise, psnr_db, to_float, train_frames
from regen_dist.training.linear_start import LINEAR_CODES
from regen_dist.training.run import build_task
from tests.helpers.tiny import tiny_run, wake

CPU = torch.device("cpu")
IDS = torch.tensor([5, 17, 2**40, 3])


def _batch(num_frames: int = 5) -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (4, 3, num_frames, 16, 24), generator=generator, dtype=torch.uint8)
    return ClipBatch(video, IDS)


def _task(**changes: Any) -> tuple[Any, PlainEngine]:
    config = tiny_run(**changes)
    task = build_task(config, CPU)
    engine = PlainEngine(config, Ranks(), task.build)
    wake(engine.module)
    return task, engine


SETTINGS: list[dict[str, Any]] = [
    {},
    {"model__latent__noise_std": 0.3},
    {"diffusion__target": "velocity", "diffusion__path": "cosine_vp"},
    {"diffusion__weighting": "velocity", "diffusion__density__kind": "uniform"},
    {"diffusion__target": "eps", "diffusion__density__pure_noise": 0.0},
    {"model__kind": "magvit2", "model__latent__noise_std": 0.3},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: "-".join(map(str, changes.values())) or "default")
@torch.no_grad()
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(changes: dict[str, Any]) -> None:
    """A batch of four has the mean loss of four batches of one, in any order: noise, timesteps and latent noise belong
    to the sample, whichever rank has it."""
    task, engine = _task(**changes)
    batch = _batch()
    together = task.loss(engine, batch, 7).value
    alone = [task.loss(engine, ClipBatch(batch.video[i, None], IDS[i, None]), 7).value for i in (2, 0, 3, 1)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)
    assert torch.stack(alone).std() > 1e-4


@pytest.mark.parametrize("changes", SETTINGS[:1] + SETTINGS[1:2], ids=["pixels", "latents"])
@torch.no_grad()
def test_randomness_is_keyed_by_seed_step_and_sample(changes: dict[str, Any]) -> None:
    """The same step again gives the same loss; another step, seed or sample id another one."""
    task, engine = _task(**changes)
    batch = _batch()
    loss = task.loss(engine, batch, 7).value
    assert torch.equal(task.loss(engine, batch, 7).value, loss)
    assert not torch.equal(task.loss(engine, batch, 8).value, loss)
    assert not torch.equal(task.loss(engine, batch._replace(sample_ids=IDS + 1), 7).value, loss)
    other, _ = _task(**changes, train__seed=4)
    assert not torch.equal(other.loss(engine, batch, 7).value, loss)


def test_images_have_a_loss_too() -> None:
    """A batch of one-frame clips trains by the same loss."""
    for kind in ("regen", "magvit2"):
        task, engine = _task(model__kind=kind)
        loss = task.loss(engine, _batch(1), 0).value
        loss.backward()
        assert loss.isfinite()


def test_one_loss_trains_every_part_end_to_end() -> None:
    """The diffusion loss reaches encoder, conditioning and decoder: no parameter is left without a gradient."""
    task, engine = _task()
    task.loss(engine, _batch(), 0).value.backward()
    still = [
        name
        for name, parameter in engine.module.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not still


def _noise(config: EmbedderConfig, ids: torch.Tensor, step: int = 3) -> Any:
    return latent_noise(config, torch.zeros(len(ids), 3, 5, 16, 24), ids, step)


def test_latent_noise() -> None:
    """Gaussian of the configured size for each channel of both latents, keyed by the sample and the step; none when
    it is off."""
    assert _noise(tiny_run(), IDS) is None
    config = tiny_run(model__latent__noise_std=0.3)
    noise = _noise(config, torch.arange(64))
    assert noise.content.shape == noise.motion.shape == (64, 8, 2, 3)
    for latent in noise:
        assert float(latent.std()) == pytest.approx(0.3, rel=0.1)
        correlation = torch.corrcoef(latent.transpose(0, 1).flatten(1)) - torch.eye(8)
        assert correlation.abs().max() < 5 / (64 * 6) ** 0.5
    assert abs(float((noise.content * noise.motion).mean())) < 0.01
    one = _noise(config, torch.tensor([41]))
    assert all(torch.equal(a[0], b[41]) for a, b in zip(one, noise, strict=True))
    assert not torch.equal(_noise(config, torch.tensor([41]), step=4).content, one.content)


@pytest.mark.parametrize(
    "changes", [{}, *SETTINGS[2:]], ids=lambda changes: "-".join(map(str, changes.values())) or "x0"
)
def test_validation(changes: dict[str, Any]) -> None:
    """One step from fixed noise: the same figures each time, a reconstruction of the clips' shape within [-1, 1], and
    the PSNR of exactly that."""
    task, engine = _task(**changes)
    task._validation_clips = _batch()  # in the place of those that are read
    first, again = (task.validate(engine) for _ in range(2))
    assert first.figures == again.figures
    assert first.made.shape == first.source.shape == (4, 3, 5, 16, 24)
    assert first.made.abs().max() <= 1
    assert first.figures["psnr_db"] == pytest.approx(psnr_db(first.source, first.made))
    assert (first.captions, first.label) == ((), "one step")
    assert set(first.figures) >= {"psnr_db", "latent_std_content", "latent_std_motion"}


def test_scale_of_pixels_and_psnr() -> None:
    """0 and 255 are -1 and 1; an error of one grey level everywhere is 48.13 dB."""
    levels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 1, 2)
    assert to_float(levels, CPU).flatten().tolist() == [-1.0, 1.0]
    black = torch.zeros(1, 3, 2, 8, 8)
    assert psnr_db(black, black + 1 / 127.5) == pytest.approx(48.1308, abs=1e-3)


def test_every_rank_builds_the_same_model() -> None:
    """The initial weights are a function of the seed alone."""
    states = []
    for seed in (3, 3, 4):
        torch.rand(5)
        states.append(build_task(tiny_run(train__seed=seed), CPU).build().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


class _SecondRank(Ranks):
    """A rank that is told what the first one found."""

    told: Any = None

    def on_main(self, job: Any) -> Any:
        return self.told


def test_a_linear_code_is_fitted_by_one_rank_for_all(tmp_path: Path) -> None:
    """The others read nothing (there is no data here), and begin with the same weights."""
    options = SyntheticOptions(number=48, seed=1, side=32, frames=5)
    build_synthetic(tmp_path / "shapes", options, workers=0)
    changes: dict[str, Any] = {"model__linear_start": "pca", "data__size": (32, 32), "data__workers": 0}
    first = build_task(tiny_run(**changes, data__url=str(tmp_path / "shapes")), CPU).build()
    plain = build_task(tiny_run(), CPU).build()
    assert not torch.equal(first.linear.weight, plain.linear.weight)
    second = _SecondRank(1, 2)
    told = {name: weight for name, weight in first.state_dict().items() if name.startswith(LINEAR_CODES)}
    object.__setattr__(second, "told", told)
    other = build_task(tiny_run(**changes, data__url=str(tmp_path / "nowhere")), CPU).build(second)
    assert all(torch.equal(weight, first.state_dict()[name]) for name, weight in other.state_dict().items())


def test_a_run_that_resumes_fits_nothing() -> None:
    """A checkpoint sets the weights; there is no data here to be read."""
    task = build_task(tiny_run(model__linear_start="pca", data__url="nowhere"), CPU)
    resumed, plain = task.build(resumes=True), build_task(tiny_run(), CPU).build()
    assert torch.equal(resumed.linear.weight, plain.linear.weight)


def test_the_decoder_is_trained_on_some_frames_of_each_clip() -> None:
    """As many as the config says, other ones in each step, the same on every rank; the encoder sees the whole clip."""
    task, engine = _task(diffusion__train_frames=2)
    drawn = [train_frames(task.config, 5, step) for step in range(12)]
    assert all(len(frames) == 2 and frames[0] < frames[1] and int(frames.max()) < 5 for frames in drawn)
    assert len({tuple(frames.tolist()) for frames in drawn}) > 3
    assert torch.equal(train_frames(task.config, 1, 3), torch.arange(1))
    seen: list[Any] = []
    forward = engine.module.forward
    engine.module.forward = lambda *inputs: seen.append(inputs) or forward(*inputs)
    loss = task.loss(engine, _batch(), 7)
    assert loss.value.isfinite()
    video, noisy, _, _, times = seen[0]
    assert video.shape[2] == 5
    assert noisy.shape[2] == 2
    assert times[0].tolist() == drawn[7].tolist()


def test_frames_that_are_left_out_cost_nothing() -> None:
    """What MFU counts: all of the encoder, and of the rest the frames that are decoded; the baseline decodes all."""
    some = {"diffusion__train_frames": 2}
    whole, part = (_task(**changes)[0].flops(_batch()) for changes in ({}, some))
    assert 0.2 * whole < part < 0.95 * whole
    baseline = {"model__kind": "magvit2"}
    assert _task(**baseline)[0].flops(_batch()) == _task(**baseline, **some)[0].flops(_batch())
