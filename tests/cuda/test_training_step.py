"""A training step of both embedders, from bytes on the host to the update, on a GPU in bf16."""

from __future__ import annotations

import pytest
import torch

from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.distributed.engine import PlainEngine
from regen_dist.distributed.ranks import Ranks
from regen_dist.training.run import build_task
from tests.helpers.tiny import clips, tiny_run


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
@pytest.mark.parametrize("frames", [5, 1])
def test_losses_fall(device: torch.device, kind: str, frames: int) -> None:
    config = tiny_run(model__kind=kind, engine__precision="bf16", optimizer__lr=3e-3)
    task = build_task(config, device)
    engine = PlainEngine(config, Ranks(), task.build)
    batch = ClipBatch(((clips(4, frames) + 1) * 127.5).to(torch.uint8), torch.arange(4))
    losses = []
    for _ in range(20):
        loss = task.loss(engine, batch, 0).value
        engine.backward(loss, is_last=True)
        assert engine.step(3e-3).applied
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
