"""The runs that the tests of this suite look at: few starts of ranks, because a start costs seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.observe.record import read_record
from tests.helpers.checkpoints import tensors
from tests.helpers.ranks import Job, forget_moments, run_ranks, train_jobs
from tests.helpers.tiny import tiny_dataset, tiny_run

STEPS, STOP, SHORTER = 20, 12, 5
LEGS = {2: STOP, 1: 15, 4: 17}  # the run that goes around: so many ranks train it to this step, and two to the end
START_S = 600.0  # for all runs of a start, on a machine that is busy
COMMON = {
    "train__steps": STEPS,
    "engine__kind": "zero3",
    "engine__persistence_threshold": 500,  # so that some parameters are gathered and some stay
    "model__latent__noise_std": 0.1,
    "train__trace_samples": True,
    "train__grad_norms_every": 1,
}
BF16: dict[str, Any] = {"engine__precision": "bf16", "engine__persistence_threshold": 100_000}  # here all of them stay
PLAIN: dict[str, Any] = {"engine__kind": "plain"}
SHORT: dict[str, Any] = {"train__steps": SHORTER}
IMAGES: dict[str, Any] = {"data__image_fraction": 0.5, "train__accumulation": 2}
COPIES = {  # stopped run: the runs that go on from it, each with the ranks that saved and the ranks that resume
    "halted": ("two_to_two", "two_to_one", "two_to_one_forgetful", "two_to_four", "around", "loaded"),
    "halted_bf16": ("two_to_two_bf16", "two_to_one_bf16"),
    "halted_one": ("one_to_two",),
}


class Runs(NamedTuple):
    """A folder of finished runs, and what to read of them.

    Args:
        folder: of the runs.
        starts: engine to each rank's master weights before the first step.
        loaded: number of ranks to each rank's pieces of the state, right after a checkpoint of two ranks was loaded.
    """

    folder: Path
    starts: dict[str, list[dict[str, Any]]]
    loaded: dict[int, list[dict[str, Any]]]

    def losses(self, name: str) -> Tensor:
        """The loss of every step, float64 [steps]; fails when a step is missing or stands there twice."""
        lines = read_record(self.folder / name / "metrics.jsonl", "train")
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return torch.tensor([line["loss"] for line in lines], dtype=torch.float64)

    def figures(self, name: str, figure: str) -> list[float]:
        """A figure of every step."""
        return [line[figure] for line in read_record(self.folder / name / "metrics.jsonl", "train")]

    def gradients(self, name: str) -> list[dict[str, float]]:
        """The norm of every layer's gradient in each step."""
        lines = read_record(self.folder / name / "metrics.jsonl", "gradients")
        return [{key: value for key, value in line.items() if key not in ("kind", "step", "time")} for line in lines]

    def tensors(self, name: str, step: int = STEPS) -> dict[str, Tensor]:
        """Everything in a checkpoint, gathered: `<kind>/<parameter>` to its whole tensor."""
        return tensors(self.folder / name, step)

    def batches(self, name: str) -> list[list[int]]:
        """The samples of each step's global batch, sorted, whichever rank had them."""
        found: dict[int, list[int]] = {}
        for path in (self.folder / name / "samples").glob("rank-*.jsonl"):
            for line in read_record(path, "samples"):
                found.setdefault(line["step"], []).extend(line["ids"])
        assert sorted(found) == list(range(1, len(found) + 1))
        return [sorted(found[step]) for step in sorted(found)]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run of the suite, in few starts of ranks; the names say what they are."""
    folder = tmp_path_factory.mktemp("runs")
    made = _maker(folder, tiny_dataset(folder / "data"))
    first = {"zero3": (2, _first_start_of_two(made)), "plain": (1, _first_start_of_one(made))}
    with ThreadPoolExecutor() as pool:  # a single rank leaves a core idle, and two wait for each other
        told = dict(zip(first, pool.map(_run, *zip(*first.values(), strict=True)), strict=True))
    starts = {name: [results[-1] for results in ranks] for name, ranks in told.items()}
    for source, copies in COPIES.items():
        for copy in copies:
            shutil.copytree(folder / source, folder / copy)
    forget_moments(folder / "two_to_one_forgetful")
    around = made("around")
    by_one = [
        *(Job(made(name)) for name in ("two_to_one", "two_to_one_forgetful")),
        Job(made("two_to_one_bf16", **BF16)),
        Job(around, stop_after=LEGS[1] - LEGS[2]),
    ]
    with ThreadPoolExecutor() as pool:
        going_on = pool.submit(_run, 1, by_one)
        loaded = {count: run_ranks(_load, count, made("loaded"), timeout_s=START_S) for count in (1, 2, 4)}
        going_on.result()
    _run(4, [Job(made("two_to_four")), Job(around, stop_after=LEGS[4] - LEGS[1])])
    _run(2, [Job(made("two_to_two")), Job(made("two_to_two_bf16", **BF16)), Job(made("one_to_two")), Job(around)])
    return Runs(folder, starts, loaded)


def _run(world_size: int, jobs: list[Job]) -> list[Any]:
    return run_ranks(train_jobs, world_size, jobs, timeout_s=START_S)


def _load(config: EmbedderConfig) -> dict[str, Any]:
    """This rank's pieces of the state that a run goes on from, as numpy arrays; runs in the ranks."""
    from regen_dist.distributed.ranks import process_group, read_environment
    from regen_dist.training.run import build_trainer

    ranks = read_environment()
    with process_group(ranks, needed=True):
        trainer = build_trainer(config, ranks)
        try:
            assert trainer.step == STOP
            return {name: piece.detach().clone().numpy() for name, piece in trainer.engine.pieces().items()}
        finally:
            trainer.close()


def _maker(folder: Path, data: Path) -> Callable[..., EmbedderConfig]:
    def make(name: str, **changes: Any) -> EmbedderConfig:
        return tiny_run(folder, data, name=name, **{**COMMON, **changes})

    return make


def _first_start_of_two(made: Callable[..., EmbedderConfig]) -> list[Job]:
    return [
        Job(made("bf16", **BF16)),
        Job(made("fp32")),
        Job(made("halted"), stop_after=STOP),
        Job(made("halted_bf16", **BF16), stop_after=STOP),
        Job(made("accumulated", train__accumulation=2, **SHORT)),
        Job(made("recomputed", engine__activation_checkpointing=True, **SHORT)),
        Job(made("selective", engine__activation_checkpointing="selective", **SHORT)),
        Job(made("partitioned", engine__partitioned_init=True, **SHORT)),
        Job(made("partitioned_bf16", engine__partitioned_init=True, **BF16, **SHORT)),
        Job(made("baseline", model__kind="magvit2", **SHORT)),
        Job(made("images", **IMAGES, **SHORT)),
        Job(made("baseline_images", model__kind="magvit2", **IMAGES, **SHORT)),
        Job(made("start", **BF16), stop_after=0),
    ]


def _first_start_of_one(made: Callable[..., EmbedderConfig]) -> list[Job]:
    return [
        Job(made("plain_bf16", **PLAIN, **BF16)),
        Job(made("plain_fp32", **PLAIN)),
        Job(made("plain_short_again", **PLAIN, **SHORT)),
        Job(made("halted_one"), stop_after=STOP),
        Job(made("plain_short", **PLAIN, **SHORT)),
        Job(made("plain_baseline", model__kind="magvit2", **PLAIN, **SHORT)),
        Job(made("plain_images", **PLAIN, **IMAGES, **SHORT)),
        Job(made("plain_baseline_images", model__kind="magvit2", **PLAIN, **IMAGES, **SHORT)),
        Job(made("plain_start", **PLAIN, **BF16), stop_after=0),
    ]
