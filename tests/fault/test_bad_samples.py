"""A sample that one rank of two cannot read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regen_dist.config import to_yaml
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import Sample
from regen_dist.observe.record import read_record
from tests.helpers.commands import run_regen_ranks, said
from tests.helpers.tiny import tiny_dataset, tiny_run

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
