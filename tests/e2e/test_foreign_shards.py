"""WebDataset tars of others: indexed, then trained on together with synthetic shards, as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.config import to_yaml
from regen_dist.observe.record import read_record
from tests.helpers.foreign import clip, write_tar
from tests.helpers.ranks import run_regen
from tests.helpers.tiny import tiny_run


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards by webdataset's own writer: wide and tall videos of 12 frames, and pictures that are no video."""
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(2):
        samples = [
            {
                "__key__": f"{number:04d}",
                "mp4": clip(12, *((48, 96) if number % 2 else (96, 48)), seed=10 * shard + number),
                "txt": f"video {number} of shard {shard}",
            }
            for number in range(6)
        ]
        write_tar(folder / f"{shard:05d}.tar", [*samples, {"__key__": "picture", "jpg.txt": "not a video"}])
    return folder


def test_tars_of_webdataset_train_once_they_are_indexed(tars: Path, tmp_path: Path) -> None:
    """A mixture of them (3/4) and of synthetic clips (1/4) in buckets of two sizes, with images."""
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    log = tmp_path / "index.log"
    assert run_regen("shards", "index", tars, "--out", tmp_path / "index", log=log) == 0, log.read_text()
    assert "12 samples" in log.read_text()
    assert {path.name: path.read_bytes() for path in tars.iterdir()} == before
    drawn = ("--number", 16, "--seed", 1, "--side", 48, "--frames", 12)
    assert run_regen("shards", "synthetic", "--out", tmp_path / "drawn", *drawn, log=tmp_path / "drawn.log") == 0
    config = tiny_run(
        tmp_path / "runs",
        data={
            "mixture": [{"url": str(tmp_path / "index"), "weight": 3}, {"url": str(tmp_path / "drawn"), "weight": 1}],
            "buckets": [[32, 64], [64, 32], [32, 32]],
            "short_side": "fit",
            "image_fraction": 0.25,
            "workers": 1,
        },
        train__steps=24,
        train__trace_samples=True,
    )
    path, log = tmp_path / "mixture.yaml", tmp_path / "train.log"
    path.write_text(to_yaml(config))
    assert run_regen("train", path, log=log) == 0, log.read_text()
    assert "data: 28 samples in 2 dataset(s), 6 bucket(s)" in log.read_text()
    run = tmp_path / "runs" / "tiny"
    assert [line["step"] for line in read_record(run / "metrics.jsonl", "train")] == list(range(1, 25))
    ids = [key for line in read_record(run / "samples" / "rank-00000.jsonl") for key in line["ids"]]
    assert len(ids) == 24 * 4
    assert len(set(ids)) == 28
