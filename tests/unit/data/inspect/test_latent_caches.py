"""`regen shards verify`, `inspect` and `order` on a latent cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.latents import NULL_TEXT, pack_latents
from regen_dist.data.format.manifest import MANIFEST, write_manifest
from regen_dist.data.format.writing import NewSample, ShardWriter, index_name
from regen_dist.data.inspect.check import Depth, verify_dataset
from regen_dist.data.storage.store import Store
from tests.helpers.foreign import change
from tests.helpers.latents import write_cache
from tools import shards


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("whole"), videos=6, clips=(1, 2, 0), size=((32, 32), (32, 48)))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Two shards, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def bad(folder: Path, depth: Depth = "deep") -> list[str]:
    return list(verify_dataset(folder, depth, workers=0).bad)


def with_options(folder: Path, **options: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["options"] |= options
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("depth", ["quick", "bytes", "deep"])
def test_a_whole_cache_is_good(whole: Path, depth: Depth) -> None:
    verdict = verify_dataset(whole, depth, workers=0)
    assert (verdict.bad, verdict.notes) == ((), ())


def test_a_flipped_byte_is_named_with_its_entry(folder: Path) -> None:
    damaged = open_dataset(folder).sample(4)
    change(folder / damaged.shard, damaged.offset + damaged.size // 2)
    found = bad(folder, "bytes")
    assert found[0] == f"{damaged.shard}: the bytes differ from those that were written"
    assert found[1].startswith(f"{damaged.name}: the bytes differ")


def test_entries_are_held_to_the_manifest_when_looked_into(folder: Path) -> None:
    with_options(folder, channels=4)
    assert bad(folder, "bytes") == []
    found = bad(folder)
    assert len(found) == 6
    assert "content latents 1x8x4x4, the index and the manifest say 1x4x4x4; " in found[0]


def test_values_that_are_not_finite_are_found(tmp_path: Path) -> None:
    write_cache(tmp_path / "good", videos=1, text_width=None)
    options, store = open_dataset(tmp_path / "good").manifest.options, Store(tmp_path / "bad")
    content = torch.zeros(1, 8, 4, 4)
    content[0, 3, 2, 1] = float("nan")
    with ShardWriter(store, "latents") as writer:
        for number, latents in enumerate((content, torch.zeros_like(content))):
            described = SampleFacts(5, 32, 32, 8.0, "a.mp4")
            data = pack_latents(latents, torch.zeros_like(content))
            writer.add(NewSample(f"key-{number}", data, described, "safetensors"))
    write_manifest(store, [index_name("latents", 0)], "latents", options)
    assert bad(tmp_path / "bad", "bytes") == []
    assert bad(tmp_path / "bad") == ["sample key-0 in latents-000000.tar: content: not all values are finite"]


def test_the_empty_caption_belongs_to_it(folder: Path) -> None:
    (folder / NULL_TEXT).write_bytes(b"not this")
    assert bad(folder, "quick") == []
    assert "null.safetensors: not a safetensors file" in bad(folder, "bytes")[0]
    (folder / NULL_TEXT).unlink()
    assert bad(folder, "quick") == [f"{NULL_TEXT}: missing"]


def run(*arguments: str) -> str:
    shown = CliRunner().invoke(shards.app, list(arguments), catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def test_the_commands_say_that_it_holds_latents(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "all latents unpack: 6 samples in 2 shards" in run("verify", str(folder), "--deep", "--workers", "0")
    shown = run("inspect", str(folder))
    assert "regen preencode" in shown
    assert "num_frames=5" in shown
    assert "squares" not in shown, "the statistics are left to --json"
    assert "Contact sheet" not in shown
    assert json.loads(run("inspect", str(folder), "--json"))["options"]["statistics"]["clips"]["num_clips"] == 6
    refused = CliRunner().invoke(shards.app, ["inspect", str(folder), "--sheet", str(folder / "sheet.png")])
    assert "holds latents that `regen preencode` made, not videos" in str(refused.exception)


def test_the_order_of_a_run_on_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = tmp_path / "run.yaml"
    data = f"data: {{url: {folder}, clips: [1, 2]}}"
    config.write_text(f"task: t2v\nname: t\n{data}\ntrain: {{batch_global: 2, steps: 1}}\n")
    shown = run("order", str(config))
    assert "data: 6 samples in 1 dataset(s), 4 bucket(s); 2 have fewer than 1 clip(s) and are left out" in " ".join(
        shown.split()
    )
    assert "10 x 32 x 48" in shown
    lines = run("order", str(config), "--step", "1").splitlines()
    assert len(lines) == 4
    keys = {entry["key"] for entry in open_dataset(folder).table().to_pylist()}
    assert {line.split("  ")[2] for line in lines[2:]} <= keys


def test_the_bytes_of_a_cache_follow_from_what_is_in_it(whole: Path, tmp_path: Path) -> None:
    again = write_cache(tmp_path, videos=6, clips=(1, 2, 0), size=((32, 32), (32, 48)))
    sums = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
        for folder in (whole, again)
    ]
    assert sums[0] == sums[1]
    assert len(sums[0]) == 6
