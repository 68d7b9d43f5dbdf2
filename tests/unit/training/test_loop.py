"""The training step: its gradients, whole, averaged, not clipped; and whole steps of each task on the meta device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.data.loading.latent_loader import LatentBatch
from regen_dist.diffusion.path import x0_from
from regen_dist.diffusion.samplers import sample
from regen_dist.distributed.engine import PlainEngine, StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.observe.record import read_record
from regen_dist.training.guards import Guards, poison_nonfinite
from regen_dist.training.metrics import StepMeter, layer_of
from regen_dist.training.run import build_task, build_trainer, train
from regen_dist.training.task import Loss, Validation
from tests.helpers.latents import write_cache
from tests.helpers.machine import META, Answers, MetaRanks
from tests.helpers.tiny import tiny_run, tiny_t2v


@pytest.fixture(scope="module")
def data(tiny_shards: Path) -> Path:
    return tiny_shards


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("decoder.blocks.3.attention.qkv.weight", "decoder.blocks.3"),
        ("decoder.timestep.net.0.bias", "decoder.timestep.net.0"),
        ("encoder.norm.weight", "encoder.norm"),
        ("kind", "kind"),
    ],
)
def test_the_layer_of_a_parameter(parameter: str, layer: str) -> None:
    assert layer_of(parameter) == layer


def test_norms_by_layer_are_in_the_record_and_make_up_the_whole(tmp_path: Path, data: Path) -> None:
    """Every second step and in no other; clipped far below, which the figures are not."""
    config = tiny_run(
        tmp_path, data, train__steps=5, train__log_every=1, train__grad_norms_every=2, train__accumulation=2,
        optimizer__clip_norm=1e-3,
    )  # fmt: skip
    assert train(config) == 0
    record = config.folder / "metrics.jsonl"
    wholes = {line["step"]: line["grad_norm"] for line in read_record(record, "train")}
    lines = read_record(record, "gradients")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        norms = {name: value for name, value in line.items() if name not in ("kind", "step", "time")}
        assert {"encoder.stem", "decoder.blocks.0", "decoder.blocks.1", "decoder.head"} <= norms.keys()
        assert math.hypot(*norms.values()) == pytest.approx(wholes[line["step"]], rel=1e-5)
        assert wholes[line["step"]] > 100 * config.optimizer.clip_norm
        assert min(norms.values()) >= 0
        assert norms["decoder.head"] > 0


def test_by_default_there_are_none(tmp_path: Path, data: Path) -> None:
    config = tiny_run(tmp_path, data, train__steps=2)
    assert train(config) == 0
    assert read_record(config.folder / "metrics.jsonl", "gradients") == []


def test_a_hook_sees_the_gradients_that_the_update_is_made_of(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both micro-batches, at every step, before anything is clipped or cleared: exactly what the engine's update
    starts from."""
    seen: list[tuple[int, dict[str, Tensor]]] = []
    used: list[dict[str, Tensor]] = []
    update = PlainEngine._update

    def watched(self: PlainEngine, lr: float) -> StepResult:
        used.append({name: param.grad.flatten().clone() for name, param in self.module.named_parameters()
                     if param.grad is not None})  # fmt: skip
        return update(self, lr)

    monkeypatch.setattr(PlainEngine, "_update", watched)
    trainer = build_trainer(tiny_run(tmp_path, data, train__accumulation=2), Ranks())
    trainer.gradient_hooks.append(lambda step, found: seen.append((step, {n: g.clone() for n, g in found})))
    try:
        for _ in range(2):
            trainer.train_step()
            trainer.meter.end_step()
    finally:
        trainer.close()
    assert [step for step, _ in seen] == [1, 2]
    for (_, shown), taken in zip(seen, used, strict=True):
        assert shown.keys() == trainer.engine.shapes().keys()
        assert all(torch.equal(shown[name], gradient) for name, gradient in taken.items())
        assert sum(int(gradient.count_nonzero()) for gradient in shown.values()) > 0


# A whole training step of each task on the meta device, which refuses tensors of two devices in one operation: bytes of
# the host to the loss, its gradients, the update, validation and sampling.


IDS = torch.tensor([5, 2**40])
WINDOWS = {"backend": "sdpa", "pattern": "window", "window": [2, 2, 3]}
EMBEDDERS: dict[str, dict[str, Any]] = {
    "regen": {},
    "baseline": {"model__kind": "magvit2"},
    "baseline with noise": {"model__kind": "magvit2", "model__latent__noise_std": 0.3},
    "windows, latent noise": {"model__decoder__attention": WINDOWS, "model__latent__noise_std": 0.3},
    "in context, learned times": {"model__conditioning": {"kind": "in_context", "time": "learned"}},
    "some frames, recomputed": {"diffusion__train_frames": 3, "engine__activation_checkpointing": True},
    "velocity, selective": {
        "diffusion": {"target": "velocity", "path": "cosine_vp", "weighting": "velocity"},
        "engine__activation_checkpointing": "selective",
    },
    "eps, bf16": {
        "diffusion": {"target": "eps", "density": {"pure_noise": 0.0}},
        "engine__precision": "bf16",
    },
}


def _clips(frames: int) -> ClipBatch:
    return ClipBatch(torch.zeros(2, 3, frames, 16, 24, dtype=torch.uint8), IDS)


def _step(task: Any, engine: PlainEngine, batch: Any, config: Any) -> Loss:
    """As the loop makes it."""
    guards, meter = Guards(config), StepMeter(MetaRanks(), config.train.batch_global, 1.0)
    loss: Loss = task.loss(engine, batch, 3)
    assert loss.value.is_meta
    engine.backward(poison_nonfinite(loss.value), is_last=True)
    grads = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    assert grads
    assert all(grad.is_meta for grad in grads)
    with Answers():  # the norm of the gradients, and what is logged, are read by the host
        meter.add(loss.value, loss.figures, task.flops(batch))
        result = engine.step(1e-3)
        guards.after_step(1, result, 0)
        meter.end_step()
        meter.read(1e-3, result)
    assert result.applied
    return loss


# What a value of these changes knows nothing of the number of frames.
ELEMENTWISE = ("baseline with noise", "velocity, selective", "eps, bf16")


@pytest.mark.parametrize(
    ("name", "frames"),
    [*((name, 5) for name in EMBEDDERS), *((name, 1) for name in EMBEDDERS if name not in ELEMENTWISE)],
)
def test_a_step_of_an_embedder(name: str, frames: int) -> None:
    config = tiny_run(**EMBEDDERS[name])
    task: Any = build_task(config, META)
    engine = PlainEngine(config, MetaRanks(), task.build)
    _step(task, engine, _clips(frames), config)
    task.__dict__["_validation_clips"] = _clips(frames)
    with Answers():
        found: Validation = task.validate(engine)
    assert found.made is not None
    assert found.made.is_meta
    assert found.figures.keys() >= {"psnr_db"}


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("path", ["rectified_flow", "cosine_vp"])
@torch.no_grad()
def test_sampling_a_clip(method: Any, path: Any) -> None:
    config = tiny_run()
    task: Any = build_task(config, META)
    model = PlainEngine(config, MetaRanks(), task.build).module
    video = torch.zeros(2, 3, 5, 16, 24, device=META)
    latents, times = model.encode(video), model.frame_times(video)  # type: ignore[operator]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(META)
        return x0_from(path, "velocity", model.denoise(x, t, latents, times), x, t)  # type: ignore[operator]

    assert sample(denoise, torch.zeros_like(video), path=path, steps=3, method=method, shift=2.0).is_meta


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("meta") / "cache", clips=[1, 2, 0])


@pytest.mark.parametrize(("clips", "backend"), [(2, "sdpa"), (0, "sdpa"), (1, "eager"), (2, "reference")])
def test_a_step_of_text_to_video(cache: Path, clips: int, backend: str) -> None:
    config = tiny_t2v(
        "runs", cache, data__text_dropout=0.4, diffusion__steps=2, model__blocks=1, model__attention__backend=backend
    )
    task: Any = build_task(config, META)
    engine = PlainEngine(config, MetaRanks(), task.build)
    content, motion = torch.zeros(4, max(clips, 1), 8, 4, 4), torch.zeros(4, clips, 8, 4, 4)
    batch = LatentBatch(content, motion, torch.zeros(4, 5, 16), torch.ones(4, 5, dtype=torch.bool), torch.arange(4))
    _step(task, engine, batch, config)
    with Answers():
        found: Validation = task.validate(engine)
    assert found.figures.keys() == {"loss"}
    noise = torch.zeros(4, 8, max(2 * clips, 1), 4, 4, device=META)
    assert task._generated(engine, noise, task._text(batch)).frames.is_meta


def test_a_mixture_of_devices_is_found() -> None:
    """The tests above can fail: a batch that stays on the host, and noise that is drawn there."""
    config = tiny_run()
    task: Any = build_task(config, META)
    engine = PlainEngine(config, MetaRanks(), task.build)
    task._noise = lambda x0, *_: torch.zeros(x0.shape)
    with pytest.raises(RuntimeError, match=r"meta|cpu"):
        task.loss(engine, _clips(5), 3)
