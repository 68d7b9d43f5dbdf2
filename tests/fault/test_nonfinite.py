"""A gradient that is not finite on one rank alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.config.embedder import RunConfig
from regen_dist.observe.record import read_record
from tests.helpers.checkpoints import folder_of, tensors
from tests.helpers.ranks import Job, run_ranks, train_jobs
from tests.helpers.tiny import tiny_dataset, tiny_run

BAD_STEP = 3  # counted from 0: the fourth step


def _train_with_a_nan(configs: list[RunConfig], bad_rank: int) -> list[Any]:
    """Train, with a loss that is NaN in one step on one rank; runs in the ranks."""
    from regen_dist.training.embedder import EmbedderTask

    clean = EmbedderTask.loss

    def loss(self: EmbedderTask, engine: Any, batch: Any, step: int) -> Any:
        found = clean(self, engine, batch, step)
        hit = step == BAD_STEP and int(os.environ["RANK"]) == bad_rank
        return found._replace(value=found.value * float("nan")) if hit else found

    EmbedderTask.loss = loss  # type: ignore[method-assign]
    return train_jobs([Job(config) for config in configs])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    data = tiny_dataset(folder / "data")
    configs = [
        tiny_run(
            folder, data, name=precision, engine__kind="zero3", engine__precision=precision, train__steps=6,
            checkpoint__every=1, checkpoint__keep_last=9,
        )
        for precision in ("fp32", "bf16")
    ]  # fmt: skip
    assert run_ranks(_train_with_a_nan, 2, configs, 1) == [[0, 0], [0, 0]]
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_ranks_skip_together(folder: Path, precision: str) -> None:
    """A NaN on rank 1 alone: no rank changes a weight, a moment or an average in that step, it is counted once, and the
    next step trains on from the state before it."""
    run = folder / precision
    before, after, later = (tensors(run, step) for step in (BAD_STEP, BAD_STEP + 1, BAD_STEP + 2))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in later.values())
    assert any(not torch.equal(after[name], later[name]) for name in after)
    states = [folder_of(run).manifest(step).state for step in (BAD_STEP, BAD_STEP + 1, 6)]
    assert [state["guards"]["nonfinite"]["skipped"] for state in states] == [0, 1, 1]
    assert [state["num_updates"] for state in states] == [BAD_STEP, BAD_STEP, 5]
    assert [line["skipped"] for line in read_record(run / "metrics.jsonl", "train")] == [0, 0, 0, 1, 1, 1]
