"""Builds out of a bucket and into one: the same bytes as between local folders, whoever is killed."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from regen_dist.data.build.build import build_shards
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import samples_of
from regen_dist.data.storage.bucket import ObjectInfo
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from tests.helpers.builds import objects, run_builds, start_build, wait_for
from tests.helpers.video import moving_square, write_video
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
