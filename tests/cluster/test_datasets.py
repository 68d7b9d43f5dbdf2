"""Datasets in a bucket: built out of it and into it, made of the tars of others, and read by `regen bench data`."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regen_dist.config.datasets import ReadConfig
from regen_dist.data.build.build import build_shards
from regen_dist.data.build.foreign import index_tars
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import samples_of
from regen_dist.data.format.manifest import MANIFEST, DatasetManifest
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.data.storage.object_store import ObjectInfo
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, DataError
from tests.helpers.datasets import members, objects, run_builds, start_build, wait_for, write_shards
from tests.helpers.proxy import Kind
from tests.helpers.stores import READER, Proxied, use
from tests.helpers.video import moving_square, write_video
from tools import shards
from tools.bench import data_cases
from tools.bench.data_cases import make_small_samples
from tools.local_services.s3 import ObjectServer

FLAGS = ["--segment-seconds", "1.5", "--short-side", "48", "--crf", "20", "--min-frames", "20"]
FLAGS += ["--part-gb", "1e-6", "--samples-per-shard", "2"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, a copy of one, and one that is broken; one has a caption beside it."""
    folder = tmp_path_factory.mktemp("sources")
    write_video(folder / "wide.mp4", moving_square(180, 64, 96, seed=1))
    write_video(folder / "tall #1%20.mp4", moving_square(108, 96, 64, seed=2))
    write_video(folder / "more" / "short one.mkv", moving_square(96, 64, 64, seed=3))
    (folder / "wide.txt").write_text("a caption")
    (folder / "zz copy.mp4").write_bytes((folder / "wide.mp4").read_bytes())
    (folder / "broken.mp4").write_bytes(b"this is no video" * 50)
    return folder


@pytest.fixture(scope="module")
def whole(local: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Result of one undisturbed build of the local folder, in a local folder."""
    out = tmp_path_factory.mktemp("whole")
    run_builds([local, "--out", out, *FLAGS, "--workers", "1"])
    return contents(out)


def contents(out: str | Path) -> dict[str, bytes]:
    """Objects of a dataset, but for the digest of its sources: of captions it takes the hash on a disk, and the store's
    tag in a bucket."""
    found = objects(out)
    plan = json.loads(found["plan.json"])
    del plan["sources"]["digest"]
    return found | {"plan.json": json.dumps(plan).encode()}


@pytest.fixture
def source_url(local: Path, bucket_url: str) -> str:
    """The same videos under a prefix of a bucket."""
    store = Store(f"{bucket_url}/videos")
    for path in local.rglob("*.*"):
        store.put(path.relative_to(local).as_posix(), path.read_bytes())
    return store.url


def copies() -> list[Path]:
    """Sources that builds keep on this machine just now."""
    return list(Path(tempfile.gettempdir()).glob("regen-sources-*/*"))


def test_a_build_from_bucket_to_bucket_that_is_killed_goes_on_with_the_same_bytes(
    source_url: str, bucket_url: str, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    out = f"{bucket_url}/dataset"
    for name in ("part-00001.plan.json", "part-00002-000000.parquet"):
        process = start_build(source_url, "--out", out, *FLAGS, "--workers", "1")
        wait_for(Store(out), name, process)
        process.kill()
        process.communicate()
    assert "manifest.json" not in Store(out).list()
    assert list(tmp_path.glob("regen-sources-*/*")), "a killed build leaves its copies"
    run_builds([source_url, "--out", out, *FLAGS, "--workers", "1"])
    assert contents(out) == whole
    assert not list(tmp_path.glob("regen-sources-*/*")), "the next one removes them"
    assert "(0 made now)" in run_builds([source_url, "--out", out, *FLAGS])[0]


def test_three_tasks_at_once_make_the_dataset_of_one(source_url: str, bucket_url: str, whole: dict[str, bytes]) -> None:
    out = f"{bucket_url}/dataset"
    flags = [source_url, "--out", out, *FLAGS, "--workers", "0"]
    outputs = run_builds(*([*flags, "--task", f"{task}/3"] for task in range(3)))
    assert contents(out) == whole
    assert any("11 samples" in output for output in outputs)


def test_lists_in_buckets_name_videos_anywhere(source_url: str, bucket_url: str, local: Path, tmp_path: Path) -> None:
    rows = [
        ("../videos/tall #1%20.mp4", "relative"),
        (f"{source_url}/wide.mp4", "by URL"),
        (str(local / "more" / "short one.mkv"), "local"),
    ]
    text = io.StringIO()
    csv.writer(text).writerows([("video", "caption"), *rows])
    Store(f"{bucket_url}/lists").put("all.csv", text.getvalue().encode())
    build_shards([f"{bucket_url}/lists/all.csv"], tmp_path / "out", workers=0)
    found = samples_of(open_dataset(tmp_path / "out").table())
    assert {(sample.source, sample.caption) for sample in found} == {
        ("../videos/tall #1%20.mp4", "relative"),
        (f"{source_url}/wide.mp4", "by URL"),
        ("short one.mkv", "local"),
    }
    Store(f"{bucket_url}/lists").put("bad.csv", b"video\nnone.mp4\n../../../../other.mp4\n")
    with pytest.raises(DataError, match=r"(?s)2 rows are wrong.*line 2: there is no none\.mp4.*line 3: .*leads out"):
        build_shards([f"{bucket_url}/lists/bad.csv"], tmp_path / "bad", workers=0)


def test_single_objects_and_empty_prefixes(source_url: str, bucket_url: str, tmp_path: Path) -> None:
    build_shards([f"{source_url}/wide.mp4"], tmp_path / "out", workers=0)
    (caption,) = {sample.caption for sample in samples_of(open_dataset(tmp_path / "out").table())}
    assert caption == "a caption"
    with pytest.raises(DataError, match="no videos"):
        build_shards([f"{bucket_url}/nothing"], tmp_path / "none", workers=0)


def test_copies_are_removed_after_an_error(source_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(DataError, match="no sample is left"):
        build_shards([f"{source_url}/broken.mp4"], tmp_path / "out", workers=0)
    assert not copies()


def test_a_disk_too_small_for_the_copies_is_told_before(
    source_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little: Callable[[Path], int] = lambda folder: 1000  # noqa: E731
    monkeypatch.setattr("regen_dist.data.build.plan.free_bytes", little)
    with pytest.raises(DataError, match="set TMPDIR to a folder on another disk"):
        build_shards([source_url], tmp_path / "out", workers=0)


def test_a_key_with_a_control_character_is_named_and_the_prefix_is_built(
    source_url: str, bucket_url: str, object_store: ObjectServer, tmp_path: Path
) -> None:
    """Put by a request of its own: no client that we use takes such a key. More objects than a page holds."""
    filer = f"http://127.0.0.1:{object_store.ports['filer']}/buckets/{source_url.removeprefix('s3://')}"
    request = urllib.request.Request(f"{filer}/od%09d.mp4", data=b"video", method="PUT")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        assert answer.status == 201
    listing = Store(source_url).list_all()
    assert listing.unreadable == {"od\td.mp4": "its key has a control character: rename it"}
    assert {"wide.mp4", "tall #1%20.mp4", "more/short one.mkv"} <= listing.found.keys()
    assert listing.found["wide.mp4"] == ObjectInfo(*Store(f"{source_url}/").list_found("wide.mp4")["wide.mp4"])
    build_shards([source_url], tmp_path / "out", BuildOptions(min_frames=20), workers=0)
    dataset = open_dataset(tmp_path / "out")
    assert [skip.source for skip in dataset.manifest.skipped if "control character" in skip.reason] == ["od\td.mp4"]
    assert {"wide.mp4", "more/short one.mkv"} <= set(dataset.table()["source"].to_pylist())


@pytest.mark.parametrize("name", ["a#b.mp4", "a?b.mp4", "c#d?/50%25 e.mp4"])
def test_lists_name_keys_as_they_stand(bucket_url: str, local: Path, tmp_path: Path, name: str) -> None:
    Store(bucket_url).put(f"odd/{name}", (local / "wide.mp4").read_bytes())
    Store(f"{bucket_url}/lists").put("odd.csv", f'video\n"{bucket_url}/odd/{name}"\n"../odd/{name}"\n'.encode())
    build_shards([f"{bucket_url}/lists/odd.csv"], tmp_path / "out", BuildOptions(min_frames=20), workers=0)
    dataset = open_dataset(tmp_path / "out")
    assert set(dataset.table()["source"].to_pylist()) == {f"{bucket_url}/odd/{name}"}
    assert [skip.reason for skip in dataset.manifest.skipped] == ["named twice: only the first is used"]


# Tars of others in a bucket: indexed in place or from the outside, verified, read.


@pytest.fixture
def tars(tmp_path: Path, bucket_url: str) -> list[Path]:
    """Three tars, here and under a folder of the bucket's prefix."""
    written = write_shards(tmp_path / "tars")
    for tar in written:
        Store(bucket_url).put_file(f"train/{tar.name}", tar)
    return written


def check_reading(url: str | Path, tars: list[Path]) -> DatasetManifest:
    """Every sample is the member of its tar."""
    dataset = open_dataset(url)
    whole = {f"train/{tar.name}": members(tar) for tar in tars}
    rows = [dataset.sample(row) for row in range(len(dataset))]
    assert [row.key for row in rows] == [f"{number:06d}" for number in range(12)]
    for row in rows:
        assert dataset.read(row) == whole[row.shard][row.member]
    return dataset.manifest


def test_tars_in_a_bucket(bucket_url: str, tars: list[Path]) -> None:
    run = CliRunner()
    shown = run.invoke(shards.app, ["index", bucket_url, "--workers", "2"], catch_exceptions=False)
    assert "12 samples" in shown.output
    assert "3 shards (3 indexed now), 0 left out" in shown.output
    check_reading(bucket_url, tars)
    assert "train/00000.index.parquet" in Store(bucket_url).list()
    again = run.invoke(shards.app, ["index", bucket_url, "--workers", "0"], catch_exceptions=False)
    assert "(0 indexed now)" in again.output
    shown = run.invoke(shards.app, ["verify", bucket_url, "--deep", "--workers", "2"], catch_exceptions=False)
    assert "every frame decodes: 12 samples in 3 shards" in shown.output
    sheet = str(tars[0].parent / "sheet.png")
    shown = run.invoke(shards.app, ["inspect", bucket_url, "--sheet", sheet], catch_exceptions=False)
    assert "caption words" in shown.output
    assert Path(sheet).exists()


def test_what_is_bad_in_a_bucket(bucket_url: str, tars: list[Path]) -> None:
    store = Store(bucket_url)
    index_tars(bucket_url, workers=0)
    damaged = open_dataset(bucket_url).sample(5)
    data = bytearray(tars[1].read_bytes())
    data[damaged.offset + damaged.size // 2] ^= 0x40
    store.put("train/00001.tar", bytes(data))
    store.put("train/00002.tar", tars[2].read_bytes()[:3000])
    store.delete("train/00000.tar")
    found = verify_dataset(bucket_url, workers=0).bad
    assert found[0].startswith("train/00000.tar: missing")
    assert found[1] == "train/00001.tar: the bytes differ from those that were written"
    assert found[2].startswith(f"sample {damaged.key} in train/00001.tar: ")
    assert found[3].startswith("train/00002.tar: 3000 bytes, the manifest says ")
    assert len(verify_dataset(bucket_url, "quick").bad) == 2
    with pytest.raises(DataError, match=r"1 of 2 tars cannot be used.*\n  train/00002\.tar: it ends at byte 3000"):
        index_tars(bucket_url, workers=0)
    assert MANIFEST not in store.list()


def test_a_bucket_that_may_only_be_read(
    bucket_url: str, tars: list[Path], object_store: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = Store(bucket_url).list()
    use(monkeypatch, object_store.environment(READER))
    with pytest.raises(AccessDenied):
        index_tars(bucket_url, workers=0)
    index_tars(bucket_url, tmp_path / "index", workers=0)
    assert check_reading(tmp_path / "index", tars).shards_url == bucket_url
    assert verify_dataset(tmp_path / "index", "deep", workers=0).bad == ()
    assert Store(bucket_url).list() == before
    assert READER.secret_key not in (tmp_path / "index" / MANIFEST).read_text()


@pytest.mark.parametrize("kind", ["reset", "short", "status"])
def test_faults_of_the_network_change_nothing(bucket_url: str, tars: list[Path], proxied: Proxied, kind: Kind) -> None:
    """A body that is cut on its way is no broken tar."""
    good = index_tars(bucket_url, workers=0).manifest
    for tar in tars:
        Store(bucket_url).delete(f"train/{tar.stem}.index.parquet")
    with proxied() as proxy:
        fault = proxy.add(kind, ".tar", every=2)
        made = index_tars(bucket_url, workers=0)
        assert (made.manifest, made.shards_made) == (good, 3)
        assert verify_dataset(bucket_url, "deep", workers=0).bad == ()
        assert fault.struck >= 3


# `regen bench data` against a real store: every way of reading brings the same samples; and the command itself.


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
