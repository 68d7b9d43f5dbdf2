"""`regen bench data` against a real store: every way of reading brings the same samples; and the command itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from regen_dist.config.datasets import ReadConfig
from regen_dist.data.format.catalogue import open_dataset
from tools.bench import data_cases
from tools.bench.data_cases import make_small_samples


def test_every_way_of_reading_brings_every_byte(bucket_url: str, tmp_path: Path) -> None:
    make_small_samples(bucket_url, 40, shard_mb=1)
    dataset = open_dataset(bucket_url)
    rows, config = data_cases.shuffled_rows(dataset), ReadConfig(cache=str(tmp_path))
    turns = [
        data_cases.by_fetcher(bucket_url, config, rows),
        data_cases.by_fetcher(bucket_url, config, rows),  # from the cache
        data_cases.by_obstore(bucket_url, config, rows),
        data_cases.by_obstore_many(bucket_url, config, rows),
    ]
    if shutil.which("curl"):
        turns.append(data_cases.by_webdataset(data_cases.presigned(bucket_url)))
    if piped := data_cases.piped(bucket_url):
        turns.append(data_cases.by_webdataset(piped))
    assert {turn.amount for turn in turns} == {dataset.records["size"].sum()}
    assert {turn.facts["samples"] for turn in turns} == {40}


def test_the_command_writes_figures_and_a_table(root: Path, tmp_path: Path) -> None:
    """With moving shapes, on a store that it starts itself."""
    command = [sys.executable, "-m", "tools.cli", "bench", "data", "--out", str(tmp_path), "--samples", "60"]
    small = ["--repeats", "1", "--seconds", "0.2", "--synthetic"]
    parts = [each for part in ("clips", "small") for each in ("--only", part)]
    done = subprocess.run([*command, *small, *parts], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "data.json").read_text())
    assert facts["data"]["videos"] == "synthetic: moving shapes"
    assert [section["what"] for section in facts["clips"]] == ["17 frames of 64x64", "17 frames of 128x128"]
    assert facts["clips"][0]["ratios"].keys() > {
        "loader, local folder",
        "loader, store",
        "loader, local folder, by CPU time",
    }
    assert facts["clips"][0]["cases"]["loader, store"]["store_cpu_s"] >= 0
    assert len(facts["config_hash"]) == 64
    assert (tmp_path / "data.md").read_text() in done.stdout
    assert not {"others", "wait", "order", "start"} & facts.keys()
