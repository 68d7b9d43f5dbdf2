"""The terms of `train.losses`: gradients, keyed randomness, resuming, and nothing where they are off."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from regen_dist import pixels
from regen_dist.checks.findings import Target
from regen_dist.checks.kernels import losses
from regen_dist.checks.run import CHECKS
from regen_dist.config import config_hash, load_saved_config, save_config
from regen_dist.config.losses import SSIM_WINDOW
from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.distributed.discriminator import DiscriminatorTrainer, build_discriminator_trainer
from regen_dist.distributed.engine import PlainEngine
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError
from regen_dist.evaluation.metrics import ssim
from regen_dist.models.perceptual import PatchDiscriminator, discriminator_loss, load_perceptual, r1_penalty
from regen_dist.training.run import build_task, train
from regen_dist.training.task import Loss
from tests.helpers.networks import vgg_tensors, write_vgg
from tests.helpers.tiny import ADVERSARIAL, saved_tensors, tiny_run, wake
from tools.describe import gather

CPU = torch.device("cpu")
SSIM: dict[str, Any] = {"train__losses__ssim__weight": 0.1}
IDS = torch.tensor([5, 17, 2**40, 3])


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vgg(tmp_path_factory.mktemp("network") / "vgg.safetensors")


def _batch(num_frames: int = 5) -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    return ClipBatch(torch.randint(0, 256, (4, 3, num_frames, 16, 24), generator=generator, dtype=torch.uint8), IDS)


def _task(**changes: Any) -> tuple[Any, PlainEngine]:
    config = tiny_run(**changes)
    task = build_task(config, CPU)
    engine = PlainEngine(config, Ranks(), task.build)
    wake(engine.module)
    return task, engine


def _settings(name: str, network: Path) -> dict[str, Any]:
    perceptual = {"weight": 0.5, "network": str(network), "frames": 2}
    return {
        "perceptual": {"train__losses__perceptual": perceptual},
        "hinge": ADVERSARIAL,
        "lecam": {**ADVERSARIAL, "train__losses__adversarial__regularisation_weight": 1.0},
        "non_saturating_r1": {
            **ADVERSARIAL, "train__losses__adversarial__loss": "non_saturating",
            "train__losses__adversarial__regularisation": "r1",
            "train__losses__adversarial__regularisation_weight": 10.0,
        },
        "ssim": SSIM,
        "both": {**ADVERSARIAL, "train__losses__perceptual": perceptual},
    }[name]  # fmt: skip


TERMS = ["perceptual", "ssim", "hinge", "lecam", "non_saturating_r1", "both"]
MODELS: dict[str, dict[str, Any]] = {
    "regen": {},
    "eps": {"diffusion__target": "eps", "diffusion__density__pure_noise": 0.0, "train__losses__signal_floor": 0.0},
    "few_frames": {"diffusion__train_frames": 3, "diffusion__target": "velocity"},
    "baseline": {"model__kind": "magvit2"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("terms", TERMS)
def test_gradients_reach_every_part(model: str, terms: str, network: Path) -> None:
    """Those of the terms alone reach encoder and decoder; the discriminator gets those of its own loss, and none of the
    model's."""
    task, engine = _task(**_settings(terms, network), **MODELS[model])
    loss = task.loss(engine, _batch(), 3)
    before = {name: p.grad.clone() for name, p in _discriminator_parameters(engine).items()}
    loss.extra.backward()
    still = [name for name, p in engine.module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    assert all(p.grad.isfinite().all() for p in engine.module.parameters())
    for name, parameter in _discriminator_parameters(engine).items():
        assert torch.equal(parameter.grad, before[name]), name
        # The head's bias gets none while the hinge is open to all logits: sources and reconstructions cancel out.
        assert parameter.numel() == 1 or before[name].any(), name
    assert bool(before) == (terms not in ("perceptual", "ssim"))


def _discriminator_parameters(engine: PlainEngine) -> dict[str, Any]:
    return {} if engine.discriminator is None else dict(engine.discriminator.module.named_parameters())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("terms", TERMS)
def test_terms_of_a_sample_do_not_depend_on_its_batch(model: str, terms: str, network: Path) -> None:
    """A batch of four has the mean terms of four batches of one, in any order, and so has the discriminator's
    gradient: whatever is drawn belongs to the sample, whichever rank has it."""
    task, engine = _task(**_settings(terms, network), **MODELS[model])
    batch = _batch()
    together = task.loss(engine, batch, 7).extra
    whole = {name: p.grad.clone() for name, p in _discriminator_parameters(engine).items()}
    if engine.discriminator is not None:
        engine.discriminator.module.zero_grad()
    alone = [task.loss(engine, ClipBatch(batch.video[i, None], IDS[i, None]), 7).extra for i in (2, 0, 3, 1)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-6)
    for name, parameter in _discriminator_parameters(engine).items():
        torch.testing.assert_close(parameter.grad / 4, whole[name], rtol=1e-3, atol=1e-6)


def test_compared_frames_are_keyed_by_seed_step_and_sample(network: Path) -> None:
    task, _ = _task(**_settings("perceptual", network))

    def drawn(ids: Tensor, step: int) -> Tensor:
        return task.extra_losses._drawn(ids, 9, 4, step)

    places = drawn(torch.arange(200), 7)
    assert torch.equal(places[[5, 3]], drawn(torch.tensor([5, 3]), 7))
    assert not torch.equal(places, drawn(torch.arange(200), 8))
    assert all(len(set(row)) == 4 for row in places.tolist())
    counts = torch.bincount(places.flatten(), minlength=9)
    assert counts.min() > 60  # of 89 on average
    other, _ = _task(**_settings("perceptual", network), train__seed=4)
    assert not torch.equal(places, other.extra_losses._drawn(torch.arange(200), 9, 4, 7))


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
@pytest.mark.parametrize("terms", TERMS)
def test_images_have_the_terms_too(kind: str, terms: str, network: Path) -> None:
    task, engine = _task(model__kind=kind, **_settings(terms, network))
    loss = task.loss(engine, _batch(1), 0)
    loss.total.backward()
    assert loss.total.isfinite()


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_off_is_the_loss_of_before(kind: str, network: Path) -> None:
    """Without terms there is no network, figure or tensor of them; with them the reconstruction's loss, which is
    logged and judged, is the same number; before `start_step` the adversarial term adds nothing."""
    task, engine = _task(model__kind=kind)
    loss = task.loss(engine, _batch(), 7)
    assert loss.extra is None
    assert loss.total is loss.value
    assert engine.discriminator is None
    assert not any("discriminator" in name for name in engine.pieces())
    other, with_terms = _task(model__kind=kind, **_settings("both", network))
    beside = other.loss(with_terms, _batch(), 7)
    assert torch.equal(beside.value, loss.value)
    assert beside.total != beside.value
    assert set(beside.figures) - set(loss.figures) == {
        "perceptual", "adversarial", "discriminator", "logit_real", "logit_fake",
    }  # fmt: skip
    later, waiting = _task(model__kind=kind, **{**ADVERSARIAL, "train__losses__adversarial__start_step": 8})
    assert later.loss(waiting, _batch(), 7).extra == 0
    assert later.loss(waiting, _batch(), 8).extra != 0


def test_signal_weighs_the_terms() -> None:
    """At the floor 1 each sample counts fully; at the floor 0, samples at pure noise count nothing."""
    pure: dict[str, Any] = {**ADVERSARIAL, "diffusion__density__pure_noise": 1.0}
    extras = []
    for floor in (0.0, 0.25, 1.0):
        task, engine = _task(**pure, train__losses__signal_floor=floor)
        extras.append(task.loss(engine, _batch(), 7).extra.item())
    assert extras[0] == 0
    assert extras[1] == pytest.approx(0.25 * extras[2])
    assert extras[2] != 0


def test_the_structural_term_is_one_less_the_ssim_that_is_measured() -> None:
    """The mean over frames; SSIM of values in [-1, 1] is that of the same pixels in 0 … 255."""
    task, engine = _task(**SSIM, train__losses__signal_floor=1.0)
    source, made = pixels.to_float(_batch().video), pixels.to_float(_batch().video.flip(0))
    loss = Loss(torch.zeros(()), {})
    extra = task.extra_losses.add(loss, engine, source, made, torch.ones(4), IDS, 0)
    frames = [[pixels.to_frames(clip) for clip in clips] for clips in (source, made)]
    measured = [[ssim(*pair) for pair in zip(one, other, strict=True)] for one, other in zip(*frames, strict=True)]
    expected = 1 - np.mean(measured)
    assert 0.5 < expected < 1.5  # of different noise
    assert extra.figures["dissimilarity"].item() == pytest.approx(expected, abs=1e-5)
    assert extra.extra.item() == pytest.approx(0.1 * expected, abs=1e-5)
    assert SSIM_WINDOW == pixels.SSIM_WINDOW


def test_configs_of_before_keep_their_text_and_hash(tmp_path: Path) -> None:
    """What is off does not stand in the saved config. The hash is that of the config before there were such losses."""
    config = tiny_run(tmp_path)
    assert "losses" not in config.model_dump(mode="json")["train"]
    assert config_hash(config) == config_hash(tiny_run(tmp_path, train__losses={}))
    on = tiny_run(tmp_path, **ADVERSARIAL)
    assert config_hash(on) != config_hash(config)
    assert "ssim" not in on.model_dump(mode="json")["train"]["losses"]  # newer than the others
    save_config(on, on.folder)
    assert load_saved_config(on.folder) == on
    structural = tiny_run(tmp_path, **SSIM)
    assert structural.model_dump(mode="json")["train"]["losses"]["ssim"] == {"weight": 0.1}
    assert type(structural).model_validate(structural.model_dump(mode="json")) == structural


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"train__losses__perceptual__weight": 0.1}, "network is not set"),
        (
            {**ADVERSARIAL, "diffusion__target": "eps", "diffusion__density__pure_noise": 0.0},
            r"set train\.losses\.signal_floor=0",
        ),
        ({**ADVERSARIAL, "train__losses__adversarial__channels": 20}, "multiple of 8"),
        ({**SSIM, "data__size": [8, 16]}, r"window is 11 pixels wide, data\.size has 8; enlarge data\.size"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ValidationError, match=found):
        tiny_run(**changes)


def test_r1_is_the_squared_slope() -> None:
    """Against differences of the logits along the slope itself."""
    torch.manual_seed(0)
    config = tiny_run(**ADVERSARIAL).train.losses.adversarial
    discriminator = PatchDiscriminator(config).double()
    video = torch.randn(2, 3, 5, 16, 16, dtype=torch.float64, requires_grad=True)
    _, penalty = r1_penalty(discriminator, video)
    (slope,) = torch.autograd.grad(discriminator(video).mean((1, 2, 3, 4)).sum(), video)
    for n in range(2):
        direction = slope[n] / slope[n].norm()
        there, back = (discriminator((video[n] + h * direction)[None]).mean() for h in (1e-5, -1e-5))
        assert float(penalty[n]) == pytest.approx(0.5 * (float(there - back) / 2e-5) ** 2, rel=1e-3)


def _made(**changes: Any) -> DiscriminatorTrainer:
    trainer = build_discriminator_trainer(tiny_run(**{**ADVERSARIAL, **changes}), Ranks())
    assert trainer is not None
    return trainer


def test_the_discriminator_learns() -> None:
    """To tell noise from its blurred self, in 40 updates; its logits' averages follow."""
    trainer, losses = _made(train__losses__adversarial__lr=2e-3), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        real = torch.randn(4, 3, 5, 16, 16, generator=generator)
        fake = torch.nn.functional.avg_pool3d(real, (1, 3, 3), 1, (0, 1, 1))
        logits = trainer.module(real), trainer.module(fake)
        loss = discriminator_loss("hinge", *logits).mean()
        trainer.backward(loss, *logits)
        trainer.step(True)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.num_updates == 40
    assert trainer.averages is not None
    assert trainer.averages.real > trainer.averages.fake


@pytest.mark.parametrize(("applied", "scale"), [(False, 1.0), (True, float("nan"))])
def test_updates_are_skipped_as_the_models_are(applied: bool, scale: float) -> None:
    """Neither a skipped step of the model nor a gradient that is not finite changes weights, moments or averages."""
    trainer = _made()
    before = {name: piece.clone() for name, piece in trainer.pieces().items()}
    logits = trainer.module(torch.zeros(1, 3, 5, 16, 16))
    trainer.backward(scale * logits.sum(), logits, logits)
    trainer.step(applied)
    assert all(torch.equal(piece, before[name]) for name, piece in trainer.pieces().items())
    assert (trainer.num_updates, trainer.averages, trainer.skipped) == (0, None, int(applied))
    assert all(parameter.grad is None for parameter in trainer.module.parameters())


@pytest.fixture(scope="module")
def data(tiny_shards: Path) -> Path:
    return tiny_shards


CONSTANT: dict[str, Any] = {"optimizer__warmup_steps": 0, "optimizer__min_lr_ratio": 1.0}


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_resuming_is_bit_exact(kind: str, tmp_path: Path, data: Path, network: Path) -> None:
    """Stopped after two steps and resumed, a run ends at the weights, moments, averages and losses of one that was not:
    the discriminator's too, which began in the second step."""
    terms = {**_settings("both", network), "train__losses__adversarial__start_step": 1, **CONSTANT}

    def run(name: str, steps: int) -> int:
        return train(tiny_run(tmp_path, data, name=name, model__kind=kind, train__steps=steps, **terms))

    assert run("straight", 4) == run("resumed", 2) == run("resumed", 4) == 0
    (one, first), (two, second) = (saved_tensors(tmp_path / name, 4) for name in ("straight", "resumed"))
    assert one.keys() == two.keys()
    assert {key.partition("/")[0] for key in one} >= {
        "discriminator", "discriminator_exp_avg", "discriminator_exp_avg_sq",
    }  # fmt: skip
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert first.state["companion"] == second.state["companion"]
    assert first.state["companion"]["num_updates"] == 3
    assert first.state["companion"]["averages"] is not None


def test_a_run_takes_the_term_up_and_gives_it_up(tmp_path: Path, data: Path) -> None:
    """A checkpoint without a discriminator begins one; with it off again it is left out; another discriminator than the
    checkpoint's is refused."""

    def run(steps: int, **changes: Any) -> int:
        return train(tiny_run(tmp_path, data, train__steps=steps, **CONSTANT, **changes))

    assert run(2) == 0
    assert run(4, **ADVERSARIAL) == 0
    assert saved_tensors(tmp_path / "tiny", 4)[1].state["companion"]["num_updates"] == 2
    with pytest.raises(CheckpointError, match=r"another discriminator; restore train\.losses\.adversarial\.channels"):
        run(5, **{**ADVERSARIAL, "train__losses__adversarial__channels": 24})
    assert run(6) == 0
    tensors, manifest = saved_tensors(tmp_path / "tiny", 6)
    assert "companion" not in manifest.state
    assert not any(key.startswith("discriminator") for key in tensors)


def test_describe_counts_what_the_terms_hold(network: Path) -> None:
    """The states' bytes are those of the tensors there are; of activations, what autograd really keeps in the passes of
    one micro-batch is within a tenth of the estimate for the discriminator, and within a half for the perceptual
    network."""
    config = tiny_run(**_settings("both", network), **SSIM, data__size=[16, 24])
    without = tiny_run(data__size=[16, 24])
    plain, found = (gather(each, world_size=1)["memory_bytes_per_gpu"] for each in (without, config))
    added = {name: size for name, size in found.items() if name not in plain}
    assert {name: size for name, size in found.items() if name in plain} == plain
    trainer = _made()
    held = sum(piece.numel() * 4 for piece in trainer.pieces().values())
    assert added["discriminator (fp32, on every GPU)"] == held * 5 / 3  # weights and moments, and gradients twice
    video = torch.rand(4, 3, 5, 16, 24, requires_grad=True)
    passes = _kept(lambda: [trainer.module(video), trainer.module(video.clone())], trainer.module.parameters())
    assert added["activations of the discriminator"] == pytest.approx(passes, rel=0.1)
    images = torch.rand(8, 3, 16, 24, requires_grad=True)
    perceptual = load_perceptual(str(network), CPU)
    weights = sum(4 * x.numel() for name, x in vgg_tensors().items() if name.startswith("features"))
    assert added["perceptual network (fp32, on every GPU)"] == weights
    kept = _kept(lambda: perceptual.distance(images.detach(), images), [])
    assert 0.5 * added["activations of the perceptual network"] < kept
    assert kept < 1.5 * added["activations of the perceptual network"]
    kept = _kept(lambda: pixels.clip_ssim(video.detach(), video), [])
    assert added["activations of SSIM"] == pytest.approx(kept, rel=0.1)


def _kept(forward: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for a backward pass, weights apart."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    for weight in weights:
        storages.pop(weight.untyped_storage().data_ptr(), None)
    del output
    return sum(storages.values())


def test_check_names_a_network_that_cannot_be_used(tmp_path: Path, network: Path) -> None:
    """`regen check` says before the job what the run would refuse at its start."""
    missing = tiny_run(train__losses__perceptual={"weight": 0.1, "network": str(tmp_path / "none.safetensors")})
    (found,) = losses(missing, Target())
    assert (found.level, found.key) == ("error", "train.losses.perceptual.network")
    assert "cannot be read" in found.message
    assert not list(losses(missing, Target(produced=[str(tmp_path / "none.safetensors")])))
    assert not list(losses(tiny_run(**_settings("both", network)), Target()))
    assert not list(losses(tiny_run(), Target()))
    assert losses in CHECKS
