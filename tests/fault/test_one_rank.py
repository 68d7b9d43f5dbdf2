"""Faults on one rank of two: a gradient that is not finite, and a sample that cannot be read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.config import to_yaml
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import Sample
from regen_dist.observe.record import read_record
from tests.helpers.checkpoints import folder_of, tensors
from tests.helpers.ranks import Job, run_ranks, run_regen_ranks, said, train_jobs
from tests.helpers.tiny import tiny_dataset, tiny_run

BAD_STEP = 3  # counted from 0: the fourth step


def _train_with_a_nan(configs: list[EmbedderConfig], bad_rank: int) -> list[Any]:
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


# A sample that one rank of two cannot read.


STEPS = 2  # of four samples each: an epoch


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sample]:
    """A config whose dataset has a sample with a flipped byte."""
    folder = tmp_path_factory.mktemp("bad")
    data = tiny_dataset(folder / "data")
    sample = open_dataset(data).sample(5)
    with (data / sample.shard).open("r+b") as tar:
        tar.seek(sample.offset + sample.size // 2)
        byte = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([byte[0] ^ 0xFF]))
    made = tiny_run(
        folder / "runs", data, data__workers=1, data__max_bad_share=1.0, engine__kind="zero3",
        engine__precision="bf16", train__steps=STEPS, train__trace_samples=True,
    )  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(made))
    return path, sample


def test_both_ranks_go_on_where_one_meets_a_bad_sample(spoilt: tuple[Path, Sample]) -> None:
    config, sample = spoilt
    logs = config.with_name("goes_on")
    assert run_regen_ranks("train", config, "name=goes_on", logs=logs) == [0, 0]
    run = config.parent / "runs" / "goes_on"
    noted = [(path.name, line) for path in sorted(run.glob("bad_samples/*")) for line in read_record(path)]
    assert [(line["shard"], line["key"]) for _, line in noted] == [(sample.shard, sample.key)], (
        "by the rank that met it"
    )
    assert [line["bad_samples"] for line in read_record(run / "metrics.jsonl", "train")] in ([1, 0], [0, 1])
    ids = [i for path in run.glob("samples/*") for line in read_record(path) for i in line["ids"]]
    assert len(ids) == 4 * STEPS
    assert sample.id not in ids
    met = dict(zip(("rank-00000.jsonl", "rank-00001.jsonl"), said(logs), strict=True))
    assert f"warning: sample {sample.key} in {sample.shard} is bad" in met[noted[0][0]]


def test_both_ranks_stop_together_past_the_share(spoilt: tuple[Path, Sample]) -> None:
    """Whichever met it, both say the same of the same step, and both end with the exit code of bad data."""
    config, _ = spoilt
    logs = config.with_name("stops")
    assert run_regen_ranks("train", config, "name=stops", "data.max_bad_share=0", logs=logs) == [3, 3]
    words = r"^(?:rank \d: )?error: (step \d: 1 of \d+ samples could not be read, data\.max_bad_share allows 0\..*)$"
    told = [re.findall(words, text, re.MULTILINE) for text in said(logs)]
    assert len(told[0]) == len(told[1]) == 1, "each rank once"
    assert told[0] == told[1]
    assert "Traceback" not in "".join(said(logs))
