"""What the training step shows of its gradients: whole, averaged, not clipped; and the norms by layer in the record."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regen_dist.distributed.engine import StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.distributed.single_process import PlainEngine
from regen_dist.observe.record import read_record
from regen_dist.training.loop import layer_of
from regen_dist.training.run import build_trainer, train
from tests.helpers.tiny import tiny_dataset, tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


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
