"""`regen shards index`: tars that others wrote become a dataset, or say what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from regen_dist.data.build import foreign
from regen_dist.data.build import foreign as members
from regen_dist.data.build.foreign import IndexedTars, index_tars
from regen_dist.data.format.catalogue import Dataset, open_dataset
from regen_dist.data.format.index import Sample, sample_id
from regen_dist.data.format.manifest import MANIFEST
from regen_dist.data.format.writing import NewSample, ShardWriter
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from tests.helpers.datasets import add_member, clip, numbered, write_shards, write_tar
from tests.helpers.datasets import members as members_of


def index(url: Path, out: Path | None = None, **options: Any) -> IndexedTars:
    return index_tars(url, out, workers=0, **options)


def samples(dataset: Dataset) -> list[Sample]:
    return [dataset.sample(row) for row in range(len(dataset))]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_tars_of_webdataset_become_a_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    keys = ["a/b/0001", "a/b/0002", "ключ/naïve 動画", "plain", "with-dash_and space"]
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=2, verbose=0) as writer:
        for number, key in enumerate(keys):
            sample = {"__key__": key, "jpg": b"not looked into", "mp4": clip(5 + number, seed=number)}
            writer.write(sample | {"info.v2.json": {"caption": "of another member"}, "txt": f" caption {number}\n"})
    made = index(folder)
    dataset = open_dataset(folder)
    assert made.shards_made == dataset.manifest.totals.shards == 3
    assert dataset.manifest.kind == "index"
    assert dataset.manifest.skipped == ()
    assert [sample.key for sample in samples(dataset)] == keys
    read = webdataset.WebDataset([str(folder / entry.name) for entry in dataset.manifest.shards], shardshuffle=False)
    for row, (sample, theirs) in enumerate(zip(samples(dataset), read, strict=True)):
        assert theirs["__key__"] == sample.key
        assert dataset.read(sample) == dataset.read(dataset.row(row)) == theirs["mp4"] == clip(5 + row, seed=row)
        assert (sample.frames, sample.height, sample.width, sample.fps) == (5 + row, 32, 48, 24.0)
        assert sample.caption == f"caption {row}"
        assert sample.id == sample_id(f"{sample.shard}/{sample.key}") == dataset.ids[row]
        assert sample.member == sample.source == f"{sample.key}.mp4"
    assert verify_dataset(folder, "deep", workers=0).bad == ()


def test_our_own_tars_can_be_indexed_again(tmp_path: Path) -> None:
    with ShardWriter(Store(tmp_path / "made"), "shard") as writer:
        from regen_dist.data.format.index import SampleFacts

        for number in range(3):
            described = SampleFacts(8, 32, 48, 24.0, source="a.mp4", caption=f"number {number}")
            writer.add(NewSample(f"key-{number}", clip(8, seed=number), described))
    (tmp_path / "tars").mkdir()
    shutil.copy(tmp_path / "made" / "shard-000000.tar", tmp_path / "tars")
    index(tmp_path / "tars")
    assert [(s.key, s.caption, s.frames) for s in samples(open_dataset(tmp_path / "tars"))] == [
        (f"key-{number}", f"number {number}", 8) for number in range(3)
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unicode_names(tmp_path: Path, form: int) -> None:
    long = "folder/" * 40 + "имя-" * 40
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        add_member(tar, f"{long}1.mp4", clip(seed=1))
        add_member(tar, f"{long}1.json", {"caption": "一"})
        add_member(tar, f"{long}2.mp4", clip(seed=2))
    index(tmp_path)
    dataset = open_dataset(tmp_path)
    assert [(s.key, s.caption) for s in samples(dataset)] == [(f"{long}1", "一"), (f"{long}2", None)]
    theirs = members_of(tmp_path / "x.tar")
    assert [dataset.read(s) for s in samples(dataset)] == [theirs[s.member] for s in samples(dataset)]


def test_captions(tmp_path: Path) -> None:
    video = clip()
    write_tar(
        tmp_path / "x.tar",
        [
            {"__key__": "both", "mp4": video, "txt": "the txt", "json": {"caption": "the json"}},
            {"__key__": "caption", "mp4": video, "json": {"text": "no", "caption": " yes "}},
            {"__key__": "text", "mp4": video, "json": {"caption": None, "text": "taken"}},
            {"__key__": "empty", "mp4": video, "txt": " \n", "json": {"caption": "used"}},
            {"__key__": "list", "mp4": video, "json": b"[1, 2]"},
            {"__key__": "several", "mp4": video, "json": {"caption": ["first", "second"], "text": "no"}},
            {"__key__": "mark", "mp4": video, "txt": b"\xef\xbb\xbfmarked"},
            {"__key__": "half", "mp4": video, "json": b'{"caption": "a\\ud800b"}'},
            {"__key__": "UPPER", "MP4": video, "TXT": b"big"},
            {"__key__": "none", "mp4": video},
        ],
        encoder=True,
    )
    index(tmp_path)
    found = {sample.key: sample.caption for sample in samples(open_dataset(tmp_path))}
    assert found == {
        "both": "the txt",
        "caption": "yes",
        "text": "taken",
        "empty": "used",
        "list": None,
        "several": "first",
        "mark": "marked",
        "half": "a?b",
        "UPPER": "big",
        "none": None,
    }


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = clip()
    monkeypatch.setattr(members, "LARGEST_VIDEO_BYTES", 100_000)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in {
            "good.mp4": video,
            "picture.jpg": b"x",
            "picture.txt": b"a picture",
            "two.mp4": video,
            "two.webm": video,
            "main.mp4": video,
            "main.depth.mp4": video,
            "side.left.mp4": video,
            "views.left.mp4": video,
            "views.right.mp4": video,
            "noise.mp4": b"this is no video" * 100,
            "empty.mp4": b"",
            "codec.mp4": video.replace(b"avc1", b"zzzz"),
            "half.mp4": video[: len(video) // 2],
            "badtext.mp4": video,
            "badtext.txt": b"\xff\xfe\xfa",
            "badjson.mp4": video,
            "badjson.json": b"{",
            "large.mp4": bytes(100_001),
            "apart.txt": b"not beside its video",
            "between.mp4": video,
            "apart.mp4": video,
            "good.txt": b"too late",
            "good.mp4 ": b"",
            ".hidden.mp4": video,
            "__meta__/x.mp4": video,
            "README": b"no dot",
            os.fsdecode(b"caf\xe9.mp4"): video,
        }.items():
            add_member(tar, name, data)
        add_member(tar, "between.mp4", video)
        add_member(tar, "again.mp4", video)
        add_member(tar, "again.mp4", video)
    manifest = index(tmp_path).manifest
    assert [s.key for s in samples(open_dataset(tmp_path))] == ["good", "main", "side", "between", "apart"]
    assert samples(open_dataset(tmp_path))[1].member == "main.mp4"
    assert samples(open_dataset(tmp_path))[2].member == "side.left.mp4"
    reasons = {skip.source.removeprefix("x.tar: "): skip.reason for skip in manifest.skipped}
    expected = {
        "picture": "it has no video, only jpg, txt",
        "two": "it has several videos: mp4, webm",
        "views": "it has several videos: left.mp4, right.mp4",
        "noise": "cannot be opened",
        "empty": "cannot be opened",
        "codec": "decoder",
        "half": "",
        "badtext": "its txt cannot be read",
        "badjson": "its json cannot be read",
        "large": "its video has 100001 bytes, more than 100000",
        "good": "the key came before in this shard",
        "between": "the key came before in this shard",
        "again": "two members are called again.mp4",
        r"caf\xe9": "its name is not UTF-8",
    }
    assert {key for key in reasons if key != "apart"} == set(expected)
    for key, reason in expected.items():
        assert reason in reasons[key], key
    assert reasons["apart"] == "it has no video, only txt"


def test_videos_that_are_links_or_sparse_are_told(tmp_path: Path) -> None:
    """Packed out of a folder of links, or with --sparse: their bytes are not there, and all else is used."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add_member(tar, "a.mp4", clip())
        for name, kind in (("b.mp4", tarfile.SYMTYPE), ("c.mp4", tarfile.LNKTYPE), ("folder.mp4", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.mp4"
            tar.addfile(info)
        info = tarfile.TarInfo("d.mp4")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        tar.addfile(info)
    skipped = index(tmp_path).manifest.skipped
    assert [(skip.source, skip.reason.partition(",")[0]) for skip in skipped] == [
        (
            "x.tar: b.mp4",
            "a link: the video is not in its place; pack the tar with --dereference and --hard-dereference",
        ),
        (
            "x.tar: c.mp4",
            "a link: the video is not in its place; pack the tar with --dereference and --hard-dereference",
        ),
        ("x.tar: d.mp4", "a sparse file"),
    ]


def test_captions_of_names_with_dots(tmp_path: Path) -> None:
    """WebDataset splits at the first dot: what is called as the video is, up to its ending, belongs to it."""
    video = clip()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in [("a.f137.mp4", video), ("a.f137.txt", b"own"), ("a.txt", b"of the key")]:
            add_member(tar, name, data)
        for name, data in [("b.v1.mp4", video), ("b.v1.json", {"caption": "told"}), ("c.v1.mp4", video)]:
            add_member(tar, name, data)
        for name, data in [("c.txt", b"of the key"), ("d.mp4", video), ("d.v1.txt", b"of another")]:
            add_member(tar, name, data)
    index(tmp_path)
    found = {sample.key: sample.caption for sample in samples(open_dataset(tmp_path))}
    assert found == {"a": "own", "b": "told", "c": "of the key", "d": None}


def test_keys_that_start_anew_in_every_shard(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / "in" / f"{shard}.tar", numbered(4, seed=10 * shard))
    index(tmp_path / "in", tmp_path / "few")
    ids = open_dataset(tmp_path / "few").ids.tolist()
    assert len(set(ids)) == 12
    write_tar(tmp_path / "in" / "00.tar", numbered(4, seed=40))
    index(tmp_path / "in", tmp_path / "more")
    assert [i for i in open_dataset(tmp_path / "more").ids if i in ids] == ids


@pytest.mark.parametrize(
    ("ending", "told"),
    [(".tar.gz", "compressed"), (".tbz2", "compressed"), (".TXZ", "compressed"), (".TAR", "must end in .tar")],
)
def test_names_that_no_reader_takes_are_told_too(tmp_path: Path, ending: str, told: str) -> None:
    tars = write_shards(tmp_path, shards=2)
    tars[0].rename(tars[0].with_suffix(ending))
    with pytest.raises(DataError, match=rf"00000\{ending}: its? .*{told}"):
        index(tmp_path)
    assert index(tmp_path, skip_broken=True).manifest.totals.shards == 1


def test_a_tar_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    tars = write_shards(tmp_path, shards=2)
    os.rename(tars[0], os.fsencode(tmp_path) + b"/caf\xe9.tar")
    with pytest.raises(DataError, match=r"caf\\xe9\.tar: its name is not UTF-8; rename it"):
        index(tmp_path)
    assert index(tmp_path, skip_broken=True).manifest.totals.shards == 1
    assert verify_dataset(tmp_path, workers=0).notes == ()


def test_what_lies_behind_the_end_is_told(tmp_path: Path) -> None:
    tars = write_shards(tmp_path, shards=2)
    tars[0].write_bytes(tars[0].read_bytes() + tars[1].read_bytes())
    tars[1].unlink()
    manifest = index(tmp_path).manifest
    assert manifest.totals.samples == 4
    assert "behind the archive's end at byte" in manifest.skipped[0].reason
    assert verify_dataset(tmp_path, workers=0).bad == ()


def test_indexing_again_does_nothing_and_takes_in_what_is_new(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=2)
    index(tmp_path)
    before = contents(tmp_path)
    assert index(tmp_path).shards_made == 0
    assert contents(tmp_path) == before
    write_tar(tmp_path / "00001.tar", numbered(6, seed=50))
    write_tar(tmp_path / "00002.tar", numbered(2, seed=60))
    (tmp_path / "00000.index.parquet").write_bytes(b"damaged")
    assert index(tmp_path).shards_made == 3
    assert [entry.samples for entry in open_dataset(tmp_path).manifest.shards] == [4, 6, 2]
    assert verify_dataset(tmp_path, workers=0).bad == ()
    (tmp_path / "00000.tar").unlink()
    assert index(tmp_path).manifest.totals.samples == 8


def test_a_tar_that_another_of_its_size_replaces_is_indexed_again(tmp_path: Path) -> None:
    tar = tmp_path / "00000.tar"
    write_tar(tar, [{"__key__": "a", "mp4": clip(5), "txt": "one"}])
    index(tmp_path)
    size = tar.stat().st_size
    write_tar(tar, [{"__key__": "a", "mp4": clip(5), "txt": "two"}])
    assert tar.stat().st_size == size
    assert index(tmp_path).shards_made == 1
    assert open_dataset(tmp_path).sample(0).caption == "two"
    assert verify_dataset(tmp_path, workers=0).bad == ()


def test_the_source_is_not_touched_with_out(tmp_path: Path) -> None:
    write_shards(tmp_path / "in")
    before = contents(tmp_path / "in")
    index(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "in") == before
    dataset = open_dataset(tmp_path / "out")
    assert dataset.manifest.shards_url == (tmp_path / "in").as_uri()
    tars = {f"{number:05d}.tar": members_of(tmp_path / "in" / f"{number:05d}.tar") for number in range(3)}
    for sample in samples(dataset):
        assert dataset.read(sample) == tars[sample.shard][sample.member]
    assert verify_dataset(tmp_path / "out", "deep", workers=0).bad == ()
    shutil.copytree(tmp_path / "in", tmp_path / "other")
    with pytest.raises(DataError, match=r"holds the index of other tars.*Nothing was changed"):
        index(tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("00001.index.parquet", b"theirs", r"did not make \(00001\.index\.parquet\); give another --out"),
        (MANIFEST, b"{}", r"did not make \(manifest\.json\)"),
        ("plan.json", b'{"of": "someone"}', r"did not make \(plan\.json\)"),
        ("plan.json", b"\x00", r"did not make \(plan\.json\)"),
        ("plan.json", b'{"schema_version": 2, "kind": "build"}', "already has an index, made by `regen shards build`"),
    ],
)
def test_nothing_is_overwritten_that_it_did_not_make(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    write_shards(tmp_path)
    (tmp_path / name).write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=says):
        index(tmp_path)
    assert contents(tmp_path) == before


def test_tables_of_other_programs_do_not_stand_in_the_way(tmp_path: Path) -> None:
    for tar in write_shards(tmp_path):
        tar.with_suffix(".parquet").write_bytes(b"img2dataset keeps its own here")
    before = contents(tmp_path)
    index(tmp_path)
    assert {name: file for name, file in contents(tmp_path).items() if name in before} == before
    assert verify_dataset(tmp_path, workers=0).notes == (
        "3 objects not named by the manifest: 00000.parquet, 00001.parquet, 00002.parquet",
    )


def test_nothing_to_index(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no \*\.tar below it"):
        index(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    write_tar(tmp_path / "x.tar", [{"__key__": "a", "jpg": b"x"}])
    with pytest.raises(DataError, match=r"no sample is left; .*:\n  x\.tar: a: it has no video, only jpg"):
        index(tmp_path)


def test_a_failing_store_is_no_broken_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path)

    def fail(store: Store, name: str, piece_bytes: int) -> Any:
        raise DataError("the network is gone")

    monkeypatch.setattr(Store, "stream", fail)
    with pytest.raises(DataError, match=r"^the network is gone$"):
        index(tmp_path, skip_broken=True)
    assert not (tmp_path / MANIFEST).exists()


def test_no_address_is_taken_from_the_description(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=1)
    index(tmp_path)
    assert b"secret" not in (tmp_path / "00000.index.parquet").read_bytes()
    assert "secret" not in json.dumps(open_dataset(tmp_path).table().to_pylist())
    assert foreign.index_name("a/b.tar") == "a/b.index.parquet"
