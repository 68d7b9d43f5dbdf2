"""ZeRO-3 learns in which order a step calls its modules, and gathers weights ahead: images and clips must not differ."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import clips, tiny_run
from tools.gpu_check.zero3 import counted_invalidations

KINDS = ("regen", "magvit2", "recomputed", "selective", "in_context")
TURNS = (5, 1, 5, 1, 1, 5)  # frames of each step's clip
CHANGES: dict[str, dict[str, Any]] = {
    "regen": {},
    "magvit2": {"model__kind": "magvit2"},
    "recomputed": {"engine__activation_checkpointing": True},
    "selective": {"engine__activation_checkpointing": "selective"},
    "in_context": {"model__conditioning__kind": "in_context"},
}


class Switched(NamedTuple):
    """A training on clips and images in turn: traces thrown away, steps that followed one, and the losses."""

    invalidations: int
    followed: int
    losses: list[float]
    plain: list[float]


@pytest.fixture(scope="module")
def switched() -> dict[str, Switched]:
    return dict(zip(KINDS, run_ranks(_train_in_turn, 1, KINDS, timeout_s=400.0)[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_clips_in_turn_keep_the_order_of_modules(switched: dict[str, Switched], kind: str) -> None:
    """Six micro-batches, images and clips in turn, with a pass without gradients between: the learned order holds to
    the end, no trace is thrown away."""
    assert switched[kind].invalidations == 0
    assert switched[kind].followed >= 4, "the order was learned, and then looked at"


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_the_plain_engine(switched: dict[str, Switched], kind: str) -> None:
    """Weights are there when a backward pass needs them, and none is let go too early."""
    assert switched[kind].losses == pytest.approx(switched[kind].plain, abs=1e-5)
    assert max(switched[kind].losses) - min(switched[kind].losses) > 1e-3


def _train_in_turn(kinds: tuple[str, ...]) -> list[Switched]:
    """Runs in the rank."""
    from regen_dist.distributed.ranks import process_group
    from regen_dist.distributed.ranks import read_environment

    ranks = read_environment()
    with process_group(ranks, needed=True):
        return [_in_turn(kind, ranks) for kind in kinds]


def _in_turn(kind: str, ranks: Any) -> Switched:
    counts: list[int] = []
    with counted_invalidations(counts):
        losses, followed = _losses("zero3", kind, ranks)
    return Switched(len(counts), followed, losses, _losses("plain", kind, ranks)[0])


def _losses(engine_kind: str, kind: str, ranks: Any) -> tuple[list[float], int]:
    import torch

    from regen_dist.data.loading.clip_loader import ClipBatch
    from regen_dist.distributed.zero3 import build_engine
    from regen_dist.training.run import build_task

    config = tiny_run(engine__kind=engine_kind, engine__persistence_threshold=0, **CHANGES[kind])
    task = build_task(config, ranks.device)
    engine: Any = build_engine(config, ranks, task.build)
    losses, followed = [], 0
    for step, frames in enumerate(TURNS):
        video = ((clips(1, frames, seed=step) + 1) * 127.5).to(torch.uint8)
        batch = ClipBatch(video, torch.tensor([step]))
        if step == 2:
            with torch.no_grad():
                task.loss(engine, batch, step)
        loss = task.loss(engine, batch, step).value
        engine.backward(loss, is_last=True)
        engine.step(1e-3)
        losses.append(float(loss.detach()))
        if engine_kind == "zero3":
            followed += engine.deepspeed.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    return losses, followed
