"""Pre-encoding that is killed, stopped, or shared by processes: always the same cache in the end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from regen_dist.config.preencode import load_preencode_config
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.inference.preencode import preencode
from regen_dist.models.text import make_small_encoder
from tests.helpers.checkpoints import saved_run
from tests.helpers.datasets import objects, wait_for

SHARDS = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file: captioned shapes in many shards, a text encoder made of their captions."""
    folder = tmp_path_factory.mktemp("preencode")
    options = SyntheticOptions(number=3 * SHARDS, seed=5, side=32, frames=12, samples_per_shard=3)
    build_synthetic(folder / "videos", options, workers=0)
    captions = open_dataset(folder / "videos").table()["caption"].to_pylist()
    make_small_encoder(captions, folder / "t5", width=16, layers=1, heads=2)
    values = {
        "embedder": str(saved_run(folder).folder),
        "data": str(folder / "videos"),
        "output": str(folder / "whole"),
        "text": {"encoder": str(folder / "t5"), "max_tokens": 32},
        "batch_clips": 4,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(config: Path) -> dict[str, bytes]:
    """What one undisturbed process makes."""
    assert preencode(load_preencode_config(config)).shards_made == SHARDS
    return objects(config.parent / "whole")


def _start(config: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.cli", "preencode", str(config), f"output={out}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_again_and_again_it_goes_on_and_makes_the_same_bytes(
    config: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """What was finished is left as it is; a killed writer's rest is cleared away."""
    out, finished = tmp_path / "out", dict[str, int]()
    for name in ("null.safetensors", "latents-000002-000000.parquet", "latents-000009.statistics.json"):
        process = _start(config, out)
        wait_for(Store(out), name, process)
        process.kill()
        process.communicate()
        now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert finished.items() <= now.items()
        finished = {
            index.with_suffix(".tar").name: now[index.with_suffix(".tar").name]
            for index in out.glob("latents-*.parquet")  # and no half of one, which begins with a dot
        }
    assert "manifest.json" not in Store(out).list()
    (out / ".latents-000011-000000.tar.0.999999999.tmp").write_bytes(b"half of a tar")
    made = preencode(load_preencode_config(config, (f"output={out}",)))
    assert made.shards_made == SHARDS - len(finished)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert objects(out) == whole
    assert not list(out.glob(".*"))


def test_asked_to_stop_it_says_how_to_go_on(config: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    process = _start(config, out)
    wait_for(Store(out), "latents-000001-000000.parquet", process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "run the same command again" in output
    assert "Traceback" not in output
    assert not list(out.glob(".*"))
    assert preencode(load_preencode_config(config, (f"output={out}",))).manifest is not None
    assert objects(out) == whole


def test_tasks_at_the_same_time_make_the_same_cache(config: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    processes = [_start(config, out, "--task", f"{task}/2") for task in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert any(f"{3 * SHARDS} entries in {SHARDS} shards" in output for output in outputs)
    assert objects(out) == whole
