"""`regen shards verify`: each defect of a dataset or latent cache is named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from typer.testing import CliRunner

from regen_dist.data.build.build import build_shards
from regen_dist.data.build.foreign import index_tars
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import Sample, SampleFacts, read_index, samples_of, write_index
from regen_dist.data.format.latents import NULL_TEXT, pack_latents
from regen_dist.data.format.manifest import MANIFEST, to_json, write_manifest
from regen_dist.data.format.writing import NewSample, ShardWriter, index_name
from regen_dist.data.inspect import check
from regen_dist.data.inspect.check import Depth, verify_dataset
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from tests.helpers.datasets import PARTS, clip, flip_byte, objects, write_shards
from tests.helpers.latents import write_cache
from tools import shards

INDEX = "00001.index.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_shards(folder)
    index_tars(folder, workers=0)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Three shards of four samples, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


def bad(folder: Path, depth: check.Depth = "bytes") -> list[str]:
    return list(verify_dataset(folder, depth, workers=0).bad)


def sample(folder: Path, row: int) -> Sample:
    return open_dataset(folder).sample(row)


def rewrite_index(folder: Path, **changes: Any) -> None:
    """Let the index of the second shard, and the manifest, say something else of its second sample."""
    table, facts = read_index((folder / INDEX).read_bytes())
    rows = [vars(row) for row in samples_of(table)]
    rows[1] |= changes
    data = write_index([Sample(**row) for row in rows], facts)
    (folder / INDEX).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][1]["index_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_bytes(to_json(manifest))


@pytest.mark.parametrize("depth", ["quick", "bytes", "deep"])
def test_a_whole_dataset_is_good(whole: Path, depth: check.Depth) -> None:
    seen: list[tuple[str, int, int]] = []
    verdict = verify_dataset(whole, depth, workers=0, progress=lambda *step: seen.append(step))
    assert (verdict.bad, verdict.notes) == ((), ())
    assert seen == [("verify", done, 3) for done in range(4)]


def test_a_flipped_byte_is_named_with_its_sample(folder: Path) -> None:
    damaged = sample(folder, 5)
    flip_byte(folder / damaged.shard, damaged.offset + damaged.size // 2)
    found = bad(folder)
    assert found[0] == "00001.tar: the bytes differ from those that were written"
    assert found[1].startswith(f"sample {damaged.key} in 00001.tar: the bytes differ from those that were written (")
    assert len(found) == 2
    assert bad(folder, "quick") == []


def test_a_flipped_byte_in_no_sample(folder: Path) -> None:
    with tarfile.open(folder / "00002.tar") as tar:
        flip_byte(folder / "00002.tar", tar.getmember("000008.json").offset_data)
    assert bad(folder) == [
        "00002.tar: the bytes differ from those that were written, in no sample: in the tar's own headers or in "
        "another member"
    ]


@pytest.mark.parametrize("depth", ["quick", "bytes"])
def test_missing_objects(folder: Path, depth: check.Depth) -> None:
    size = (folder / "00000.tar").stat().st_size
    (folder / "00000.tar").unlink()
    (folder / INDEX).unlink()
    assert bad(folder, depth) == [
        f"00000.tar: missing, the manifest says {size} bytes",
        "00001.index.parquet: missing",
    ]


def test_a_cut_tar_names_the_samples_that_it_lost(folder: Path) -> None:
    lost, tar = sample(folder, 6), folder / "00001.tar"
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[: lost.offset + 100])
    line = f"00001.tar: {lost.offset + 100} bytes, the manifest says {size} bytes"
    assert bad(folder, "quick") == [line]
    last = sample(folder, 7)
    assert bad(folder) == [
        line,
        f"sample {lost.key} in 00001.tar: 100 of its {lost.size} bytes are there",
        f"sample {last.key} in 00001.tar: 0 of its {last.size} bytes are there",
    ]


def test_an_index_of_another_shard(folder: Path) -> None:
    shutil.copy(folder / "00002.index.parquet", folder / INDEX)
    assert bad(folder) == [f"{INDEX}: the bytes differ from those that were written"]
    flip_byte(folder / "00001.tar", 3000)
    assert [line.partition(":")[0] for line in bad(folder)] == [INDEX, "00001.tar"]


def test_an_index_that_does_not_fit_its_manifest(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][1]["samples"] = 3
    (folder / MANIFEST).write_bytes(to_json(manifest))
    totals, sums = "(3, 12, ", "(3, 11, "
    found = bad(folder)
    assert found[0].startswith(f"{MANIFEST}: its totals (shards, samples, bytes) are {totals}")
    assert sums in found[0]
    assert found[1] == f"{INDEX}: holds 4 samples, the manifest says 3"
    (folder / INDEX).write_bytes(b"no Parquet at all")
    manifest["shards"][1]["index_sha256"] = hashlib.sha256(b"no Parquet at all").hexdigest()
    (folder / MANIFEST).write_bytes(to_json(manifest))
    assert bad(folder)[1].startswith(f"{INDEX}: not an index")


def test_manifests(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        bad(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"there is no manifest\.json, so no finished dataset") as caught:
        bad(folder, "quick")
    assert caught.value.exit_code == 3
    assert "latents with `regen preencode`" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 70}, "7 frames of 32x48 come out, the index says 70 of 32x48"),
        ({"height": 48, "width": 32}, "7 frames of 32x48 come out, the index says 7 of 48x32"),
    ],
)
def test_deep_compares_what_comes_out_with_the_index(folder: Path, changes: dict[str, int], says: str) -> None:
    rewrite_index(folder, **changes)
    assert bad(folder) == []
    assert bad(folder, "deep") == [f"sample 000005 in 00001.tar: {says}"]


def test_deep_finds_videos_that_do_not_decode(tmp_path: Path) -> None:
    """Damage that was there before the index was made: only decoding shows it."""
    tars = write_shards(tmp_path, shards=2)
    index_tars(tmp_path, tmp_path / "first", workers=0)
    damaged = sample(tmp_path / "first", 5)
    video = open_dataset(tmp_path / "first").read(damaged)
    with av.open(BytesIO(video)) as container:
        last = max((packet.pos or 0, packet.size) for packet in container.demux(video=0) if packet.size)
    data = bytearray(tars[1].read_bytes())
    at = damaged.offset + last[0]
    data[at + 4 : at + last[1]] = bytes(last[1] - 4)
    tars[1].write_bytes(data)
    index_tars(tmp_path, tmp_path / "second", workers=0)
    assert len(open_dataset(tmp_path / "second")) == 8
    assert bad(tmp_path / "second") == []
    found = bad(tmp_path / "second", "deep")
    assert len(found) == 1
    assert found[0].startswith("sample 000005 in 00001.tar: it cannot be decoded")


def test_many_bad_samples_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_SAMPLES_NAMED", 2)
    for row in range(4):
        flip_byte(folder / "00000.tar", sample(folder, row).offset)
    found = bad(folder)
    assert len(found) == 4
    assert found[-1] == "00000.tar: and 2 samples more"


def test_what_belongs_to_nothing_is_mentioned(folder: Path) -> None:
    (folder / ".00004.tar.0.999999999.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("x")
    verdict = verify_dataset(folder, workers=0)
    assert verdict.bad == ()
    assert verdict.notes == (
        "1 objects not named by the manifest: notes.txt",
        "1 objects left by a killed command (the same command again removes them): .00004.tar.0.999999999.tmp",
    )


def test_the_records_of_a_build_belong_to_it(tmp_path: Path) -> None:
    """Its parts and their plans, and the index of a part whose sources were all left out."""
    (tmp_path / "a.mp4").write_bytes(clip(24))
    (tmp_path / "b.mp4").write_bytes(clip(4))
    build_shards([tmp_path], tmp_path / "out", replace(PARTS, min_motion=0), workers=0)
    assert "part-00001-000000.parquet" in objects(tmp_path / "out")
    assert verify_dataset(tmp_path / "out", workers=0).notes == ()


def test_samples_are_never_all_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the tars nor the rows of the dataset are read as a whole."""

    def refuse(*arguments: object) -> bytes:
        raise AssertionError("a shard was read whole")

    real = Store.get
    monkeypatch.setattr(Store, "get", lambda store, name: refuse() if name.endswith(".tar") else real(store, name))
    monkeypatch.setattr("regen_dist.data.format.catalogue.open_dataset", refuse)
    assert bad(folder, "deep") == []


def test_the_command(folder: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(shards.app, ["verify", str(folder), *arguments], catch_exceptions=False)
        return result.output

    assert "everything is as it was written: 12 samples in 3 shards" in run("--workers", "0")
    assert "no byte was read" in run("--quick")
    assert "every frame decodes" in run("--deep", "--workers", "0")
    assert "exclude each other" in run("--deep", "--quick")
    (folder / "notes.txt").write_text("x")
    assert "Note: 1 objects not named by the manifest: notes.txt" in run("--quick")
    (folder / "00002.tar").unlink()
    with pytest.raises(DataError, match=r"1 problem in .*copy the tars named again.*\n00002\.tar: missing") as caught:
        run("--quick")
    assert caught.value.exit_code == 3


# `regen shards verify`, `inspect` and `order` on a latent cache.


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("whole_cache"), videos=6, clips=(1, 2, 0), size=((32, 32), (32, 48)))


@pytest.fixture
def cache_folder(whole_cache: Path, tmp_path: Path) -> Path:
    """Two shards, to damage."""
    return Path(shutil.copytree(whole_cache, tmp_path / "cache"))


def bad_entries(cache_folder: Path, depth: Depth = "deep") -> list[str]:
    return list(verify_dataset(cache_folder, depth, workers=0).bad)


def with_options(cache_folder: Path, **options: Any) -> None:
    manifest = json.loads((cache_folder / MANIFEST).read_text())
    manifest["options"] |= options
    (cache_folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("depth", ["quick", "bytes", "deep"])
def test_a_whole_cache_is_good(whole_cache: Path, depth: Depth) -> None:
    verdict = verify_dataset(whole_cache, depth, workers=0)
    assert (verdict.bad, verdict.notes) == ((), ())


def test_a_flipped_byte_is_named_with_its_entry(cache_folder: Path) -> None:
    damaged = open_dataset(cache_folder).sample(4)
    flip_byte(cache_folder / damaged.shard, damaged.offset + damaged.size // 2)
    found = bad_entries(cache_folder, "bytes")
    assert found[0] == f"{damaged.shard}: the bytes differ from those that were written"
    assert found[1].startswith(f"{damaged.name}: the bytes differ")


def test_entries_are_held_to_the_manifest_when_looked_into(cache_folder: Path) -> None:
    with_options(cache_folder, channels=4)
    assert bad_entries(cache_folder, "bytes") == []
    found = bad_entries(cache_folder)
    assert len(found) == 6
    assert "content latents 1x8x4x4, the index and the manifest say 1x4x4x4; " in found[0]


def test_values_that_are_not_finite_are_found(tmp_path: Path) -> None:
    write_cache(tmp_path / "good", videos=1, text_width=None)
    options, store = open_dataset(tmp_path / "good").manifest.options, Store(tmp_path / "bad_entries")
    content = torch.zeros(1, 8, 4, 4)
    content[0, 3, 2, 1] = float("nan")
    with ShardWriter(store, "latents") as writer:
        for number, latents in enumerate((content, torch.zeros_like(content))):
            described = SampleFacts(5, 32, 32, 8.0, "a.mp4")
            data = pack_latents(latents, torch.zeros_like(content))
            writer.add(NewSample(f"key-{number}", data, described, "safetensors"))
    write_manifest(store, [index_name("latents", 0)], "latents", options)
    assert bad_entries(tmp_path / "bad_entries", "bytes") == []
    assert bad_entries(tmp_path / "bad_entries") == [
        "sample key-0 in latents-000000.tar: content: not all values are finite"
    ]


def test_the_empty_caption_belongs_to_it(cache_folder: Path) -> None:
    (cache_folder / NULL_TEXT).write_bytes(b"not this")
    assert bad_entries(cache_folder, "quick") == []
    assert "null.safetensors: not a safetensors file" in bad_entries(cache_folder, "bytes")[0]
    (cache_folder / NULL_TEXT).unlink()
    assert bad_entries(cache_folder, "quick") == [f"{NULL_TEXT}: missing"]


def run(*arguments: str) -> str:
    shown = CliRunner().invoke(shards.app, list(arguments), catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def test_the_commands_say_that_it_holds_latents(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "all latents unpack: 6 samples in 2 shards" in run("verify", str(cache_folder), "--deep", "--workers", "0")
    shown = run("inspect", str(cache_folder))
    assert "regen preencode" in shown
    assert "num_frames=5" in shown
    assert re.search(r"│ preprocessing +│ .*stride=1", shown)
    assert "{'" not in shown
    assert "squares" not in shown, "the statistics are left to --json"
    assert "Contact sheet" not in shown
    assert json.loads(run("inspect", str(cache_folder), "--json"))["options"]["statistics"]["clips"]["num_clips"] == 6
    refused = CliRunner().invoke(shards.app, ["inspect", str(cache_folder), "--sheet", str(cache_folder / "sheet.png")])
    assert "holds latents that `regen preencode` made, not videos" in str(refused.exception)


def test_the_order_of_a_run_on_it(cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = tmp_path / "run.yaml"
    data = f"data: {{url: {cache_folder}, clips: [1, 2]}}"
    config.write_text(f"task: t2v\nname: t\n{data}\ntrain: {{batch_global: 2, steps: 1}}\n")
    shown = run("order", str(config))
    assert "data: 6 samples in 1 dataset(s), 4 bucket(s); 2 have fewer than 1 clip(s) and are left out" in " ".join(
        shown.split()
    )
    assert "10 x 32 x 48" in shown
    lines = run("order", str(config), "--step", "1").splitlines()
    assert len(lines) == 4
    keys = {entry["key"] for entry in open_dataset(cache_folder).table().to_pylist()}
    assert {line.split()[2] for line in lines[2:]} <= keys


def test_the_bytes_of_a_cache_follow_from_what_is_in_it(whole_cache: Path, tmp_path: Path) -> None:
    again = write_cache(tmp_path, videos=6, clips=(1, 2, 0), size=((32, 32), (32, 48)))
    sums = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(cache_folder.iterdir())}
        for cache_folder in (whole_cache, again)
    ]
    assert sums[0] == sums[1]
    assert len(sums[0]) == 6
