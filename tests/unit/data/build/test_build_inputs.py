"""Builds of difficult inputs: odd display, names and rates, and objects of buckets that cannot be fetched."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regen_dist.data.build.build import build_shards
from regen_dist.data.build.foreign import index_tars
from regen_dist.data.build.plan import BuildPart, Copies
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.build.sources import VideoSource, find_sources
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.manifest import DatasetManifest, read_manifest
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.data.storage.store import Store
from regen_dist.data.video.conversion import LeftOut
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import DataError, DiskFull
from regen_dist.inference.frames import SourceVideo
from regen_dist.inference.frames import write_video as write_frames
from tests.helpers.stores import BUCKET, FakeStore, fake_store, use
from tests.helpers.video import H264, PATTERN, ffmpeg, moving_square, write_video

CHANGES = {"short_side": 64, "min_frames": 4, "segment_seconds": 10.0}
HLG = "setparams=color_primaries=bt2020:color_trc=arib-std-b67:colorspace=bt2020nc:range=tv"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plain video, and one of each kind that must be converted."""
    folder = tmp_path_factory.mktemp("sources")
    short = (*PATTERN, "-t", "0.5")
    ffmpeg(*short, *H264, folder / "plain.mp4")
    ffmpeg(*short, "-vf", "setsar=4/3", *H264, folder / "wide.mp4")
    ffmpeg(*short, "-vf", f"format=yuv420p10le,{HLG}", "-c:v", "libx264", folder / "hlg.mp4")
    fields = ("-vf", "interlace=lowpass=0", "-flags", "+ilme+ildct", "-x264-params", "tff=1")
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=192x128:rate=48:duration=0.5", *fields, *H264, folder / "fields.mp4")
    return folder


def kinds(manifest: DatasetManifest) -> dict[str, str]:
    return {Path(note.source).stem: note.note.partition(":")[0] for note in manifest.notes}


@pytest.mark.parametrize("keep", [False, True])
def test_a_build_converts_and_says_so(sources: Path, tmp_path: Path, keep: bool) -> None:
    manifest = build_shards([sources], tmp_path, BuildOptions(**CHANGES, keep=keep), workers=0).manifest  # type: ignore[arg-type]
    assert manifest is not None
    assert manifest == read_manifest(Store(tmp_path))
    assert kinds(manifest) == {"wide": "non-square pixels", "hlg": "HDR", "fields": "interlaced"}
    assert (manifest.options["hdr"], manifest.options["interlaced"]) == ("tone-map", "deinterlace")
    assert not manifest.skipped
    dataset = open_dataset(tmp_path)
    for row in range(len(dataset)):
        sample = dataset.sample(row)
        aspect = 2 if sample.source == "wide.mp4" else 1.5
        assert sample.width / sample.height == pytest.approx(aspect)
        with VideoReader(dataset.read(sample), convert=False) as reader:
            (_, frame), *_ = reader.frames([0])
            untouched = keep and sample.source == "hlg.mp4"
            assert frame.color_trc == (18 if untouched else 1 if sample.source == "hlg.mp4" else 2)
            assert frame.interlaced_frame == (keep and sample.source == "fields.mp4")
    assert not verify_dataset(tmp_path, "deep", workers=0).bad


def test_a_build_leaves_out_what_it_is_told_to(sources: Path, tmp_path: Path) -> None:
    options = BuildOptions(**CHANGES, hdr="leave-out", interlaced="leave-out")  # type: ignore[arg-type]
    manifest = build_shards([sources], tmp_path, options, workers=0).manifest
    assert manifest is not None
    assert {skip.source: skip.reason.partition(":")[0] for skip in manifest.skipped} == {
        "hlg.mp4": "HDR",
        "fields.mp4": "interlaced",
    }
    assert manifest.totals.samples == 2


def test_an_index_tells_shown_sides_and_leaves_out_too(sources: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(sources.iterdir()):
            tar.add(path, path.name)
    manifest = index_tars(tmp_path, workers=0).manifest
    noted = {note.source: note.note.partition(":")[0] for note in manifest.notes}
    assert noted == {
        "a.tar: wide": "non-square pixels",
        "a.tar: hlg": "HDR",
        "a.tar: fields": "interlaced",
    }
    dataset = open_dataset(tmp_path)
    sides = {dataset.sample(row).source: dataset.sample(row).width for row in range(len(dataset))}
    assert sides == {"plain.mp4": 192, "wide.mp4": 256, "hlg.mp4": 192, "fields.mp4": 192}
    assert not verify_dataset(tmp_path, "deep", workers=0).bad
    manifest = index_tars(tmp_path, workers=0, unwanted=LeftOut(hdr=True, interlaced=True)).manifest
    assert sorted(skip.reason.partition(":")[0] for skip in manifest.skipped) == ["HDR", "interlaced"]
    assert (manifest.totals.samples, manifest.options["hdr"]) == (2, "leave-out")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"short_side": 1_000_000}, "--short-side 1000000: must be at most"),
        ({"segment_seconds": float("nan")}, "--segment-seconds nan"),
        ({"max_seconds": float("inf")}, "--max-seconds inf"),
        ({"hdr": "yes"}, "--hdr yes"),
        ({"interlaced": "no"}, "--interlaced no"),
    ],
)
def test_options_that_make_no_sense_are_named(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(DataError, match=named):
        BuildOptions(**wrong)  # type: ignore[arg-type]


def test_sides_that_no_encoder_takes_are_a_reason(tmp_path: Path) -> None:
    """A strip of 16 x 1024 with its short side at 4320 is 276480 wide."""
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=1024x16:rate=8:duration=0.5", *H264, tmp_path / "strip.mp4")
    ffmpeg(*PATTERN, "-t", "0.2", *H264, tmp_path / "plain.mp4")
    options = BuildOptions(short_side=4000, min_frames=2)
    with pytest.raises(DataError, match="no sample is left") as error:
        build_shards([tmp_path / "strip.mp4"], tmp_path / "out", options, workers=0)
    assert "strip.mp4" in str(error.value)
    with pytest.raises(DataError, match="short side is 1000000"):
        SourceVideo(tmp_path / "plain.mp4", short_side=1_000_000)


@pytest.mark.parametrize("keep", [False, True])
def test_one_frame_is_a_sample_when_nothing_forbids_it(tmp_path: Path, keep: bool) -> None:
    ffmpeg(*PATTERN, "-frames:v", "1", *H264, tmp_path / "one.mp4")
    options = BuildOptions(min_frames=1, min_motion=0, keep=keep)
    manifest = build_shards([tmp_path / "one.mp4"], tmp_path / "out", options, workers=0).manifest
    assert manifest is not None
    assert (manifest.totals.samples, manifest.totals.frames) == (1, 1)


def test_a_kept_video_of_variable_rate_has_its_true_rate(tmp_path: Path) -> None:
    kept = "not(mod(n\\,3))+lt(n\\,30)"
    ffmpeg(*PATTERN, "-vf", f"select='{kept}'", "-fps_mode", "vfr", *H264, tmp_path / "a.mkv")
    with VideoReader(tmp_path / "a.mkv") as reader:
        pts = np.array(reader.table.pts) * float(reader.stream.time_base or 0)
        truth = (len(pts) - 1) / (pts[-1] - pts[0])
    options = BuildOptions(min_frames=2, keep=True)
    build_shards([tmp_path / "a.mkv"], tmp_path / "out", options, workers=0)
    sample = open_dataset(tmp_path / "out").sample(0)
    assert sample.frames == 40
    assert sample.fps == pytest.approx(truth, rel=0.01)
    assert truth == pytest.approx(16.5, abs=0.6)


@pytest.mark.parametrize("name", ["rec:12.mp4", "http:a.mp4", "a%03d.mp4", "pipe:1.mp4", "it's, [odd];.mp4"])
def test_a_path_is_a_path_whatever_it_looks_like(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain.mp4"
    ffmpeg(*PATTERN, "-t", "0.5", *H264, plain)
    (tmp_path / "in").mkdir()
    plain.rename(tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path / "in")
    assert SourceVideo(Path(name)).num_frames == 12
    manifest = build_shards(["."], tmp_path / "out", BuildOptions(**CHANGES), workers=0).manifest  # type: ignore[arg-type]
    assert manifest is not None
    assert manifest.totals.samples == 1
    write_frames(Path(f"out {name}"), SourceVideo(Path(name)).frames(), 24)
    assert SourceVideo(Path(f"out {name}")).num_frames == 12


@pytest.mark.parametrize("text", ["CLIP.TXT", "CLIP.txt", "clip.txt"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_caption_belongs_to_its_video_in_any_case(tmp_path: Path, text: str, alone: bool) -> None:
    (tmp_path / "CLIP.MP4").write_bytes(b"video")
    (tmp_path / text).write_text("A street")
    (source,) = find_sources([tmp_path / "CLIP.MP4" if alone else tmp_path]).found
    assert source.text == text


# Builds out of buckets of which some objects cannot be had: these are left out with the reason, the rest is built.


URL = f"s3://{BUCKET}/v"
OPTIONS = BuildOptions(segment_seconds=1.5, short_side=48, crf=20, min_frames=20, samples_per_shard=1, scenes=False)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("made")
    frames = [moving_square(40 + 36 * number, 48, 64, seed=number) for number in range(3)]
    return [write_video(folder / f"{number}.mp4", each).read_bytes() for number, each in enumerate(frames)]


@pytest.fixture
def server(videos: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStore]:
    """Three good videos, one of them with a caption beside it."""
    with fake_store() as store:
        use(monkeypatch, store.environment())
        names = ("a.mp4", "m.mp4", "z.mp4")
        store.objects = {f"v/{name}": data for name, data in zip(names, videos, strict=True)}
        store.objects["v/a.txt"] = b"a square"
        yield store


def _sources(out: Path) -> set[str]:
    return {str(source) for source in open_dataset(out).table()["source"].to_pylist()}


def _left_out(out: Path) -> dict[str, str]:
    return {skip.source: skip.reason for skip in open_dataset(out).manifest.skipped if skip.segment is None}


@pytest.mark.parametrize("workers", [0, 1])
def test_each_source_that_cannot_be_fetched_is_left_out_with_the_reason(
    server: FakeStore, tmp_path: Path, workers: int
) -> None:
    server.objects |= {f"v/{name}": b"1" * size for size, name in enumerate(("b.mp4", "c.mp4", "d\\e.mp4", "f.mp4"), 1)}
    server.objects |= {"v//g.mp4": b"1", "v/h\n.mp4": b"1", "v//no video": b"1"}
    server.refused = {
        "v/b.mp4": (404, "NoSuchKey"), "v/c.mp4": (403, "InvalidObjectState"), "v/d\\e.mp4": (404, "NoSuchKey"),
        "v/f.mp4": (403, "AccessDenied"),
    }  # fmt: skip
    build_shards([URL], tmp_path / "out", OPTIONS, workers=workers)
    assert _sources(tmp_path / "out") == {"a.mp4", "m.mp4", "z.mp4"}
    reasons = _left_out(tmp_path / "out")
    expected = {
        "b.mp4": "not found", "c.mp4": "archived", "d\\e.mp4": "not found", "f.mp4": "access denied",
        "/g.mp4": "empty part", "h\n.mp4": "control character",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    assert all(words in reasons[name] for name, words in expected.items()), reasons


def test_sources_of_one_size_are_compared_though_one_cannot_be_fetched(
    server: FakeStore, videos: list[bytes], tmp_path: Path
) -> None:
    """Copies are found by reading all sources of a size."""
    server.objects |= {"v/b.mp4": videos[0], "v/c.mp4": videos[0]}
    server.refused = {"v/a.mp4": (403, "InvalidObjectState")}
    build_shards([URL], tmp_path / "out", replace(OPTIONS, part_gb=1e-6), workers=0)
    assert _sources(tmp_path / "out") == {"b.mp4", "m.mp4", "z.mp4"}
    assert {name: reason.split(":")[0] for name, reason in _left_out(tmp_path / "out").items()} == {
        "a.mp4": "unreadable", "c.mp4": "duplicate",
    }  # fmt: skip


def test_a_disk_with_room_for_one_part(
    server: FakeStore, videos: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next part is copied ahead only where both fit; one that does not fit alone is an error."""
    room = max(map(len, videos))

    def free(folder: Path) -> int:
        return room - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    monkeypatch.setattr("regen_dist.data.build.plan.free_bytes", free)
    build_shards([URL], tmp_path / "out", replace(OPTIONS, part_gb=1e-6), workers=0)
    assert _sources(tmp_path / "out") == {"a.mp4", "m.mp4", "z.mp4"}
    part = BuildPart(0, 0, (VideoSource("a", URL, "a.mp4", room),))
    copies = Copies(tmp_path / "copies")
    (tmp_path / "copies").mkdir()
    copies.make_room(part)
    with pytest.raises(DiskFull, match=r"0\.0 GB are free"):  # the first copies are on their way
        copies.make_room(part._replace(number=1))
    copies.remove(part)
    copies.make_room(part._replace(number=1))
    room -= 1
    with pytest.raises(DiskFull, match=r"set TMPDIR to a folder on another disk"):
        build_shards([URL], tmp_path / "small", replace(OPTIONS, part_gb=1e-6), workers=0)


def test_a_caption_that_cannot_be_fetched_leaves_its_video_out(server: FakeStore, tmp_path: Path) -> None:
    server.refused = {"v/a.txt": (403, "InvalidObjectState")}
    build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    assert "archived" in _left_out(tmp_path / "out")["a.mp4"]


def test_another_caption_of_the_same_length_is_refused(server: FakeStore, tmp_path: Path) -> None:
    """In a bucket by the object's tag, so that no text is fetched for it."""
    build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    server.objects["v/a.txt"] = b"a circle"
    with pytest.raises(DataError, match="digest"):
        build_shards([URL], tmp_path / "out", OPTIONS, workers=0)


@pytest.mark.parametrize("answer", [(403, "ExpiredToken"), (403, "InvalidAccessKeyId"), (404, "NoSuchBucket")])
def test_what_concerns_the_whole_store_stops_and_a_rerun_goes_on(
    server: FakeStore, tmp_path: Path, answer: tuple[int, str]
) -> None:
    """Nothing is left out for it: every next source would be, too."""
    server.refused = {"v/m.mp4": answer}
    with pytest.raises(DataError, match=r"access denied|no bucket"):
        build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    server.refused = {}
    build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    assert (_sources(tmp_path / "out"), _left_out(tmp_path / "out")) == ({"a.mp4", "m.mp4", "z.mp4"}, {})


def test_a_rerun_goes_on_though_a_source_can_no_longer_be_fetched(
    server: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was planned, and then archived: its segments that are not made yet are left out."""
    build_shards([URL], tmp_path / "whole", OPTIONS, workers=0)
    put_new, out = Store.put_new, tmp_path / "out"

    def die(store: Store, name: str, data: bytes) -> bool:
        if name == "part-00000-000003.parquet":
            raise KeyboardInterrupt
        return put_new(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_new", die)
        with pytest.raises(KeyboardInterrupt):
            build_shards([URL], out, OPTIONS, workers=0)
    server.refused = {"v/z.mp4": (403, "InvalidObjectState")}
    build_shards([URL], out, OPTIONS, workers=0)
    whole, found = open_dataset(tmp_path / "whole"), open_dataset(out)
    left_out = [skip for skip in found.manifest.skipped if skip.source == "z.mp4" and "archived" in skip.reason]
    assert left_out
    assert len(found) + len(left_out) == len(whole)


def test_a_build_of_nothing_but_refused_sources_says_why(server: FakeStore, tmp_path: Path) -> None:
    server.refused = dict.fromkeys(server.objects, (403, "AccessDenied"))
    with pytest.raises(DataError, match=r"(?s)no sample is left.*a\.mp4: unreadable: .*access denied"):
        build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    server.objects = {"v//b.mp4": b"1"}
    with pytest.raises(DataError, match=r"(?s)no videos .*left out:.*/b\.mp4: its key has an empty part"):
        build_shards([URL], tmp_path / "out", OPTIONS, workers=0)


def test_an_odd_tar_is_named(server: FakeStore, tmp_path: Path) -> None:
    server.objects = {"v//b.tar": b"1"}
    with pytest.raises(DataError, match=r"/b\.tar: its key has an empty part"):
        index_tars(URL, tmp_path / "out", workers=0)


@pytest.mark.parametrize("name", ["a#b.mp4", "a?b.mp4", "a?x=1.mp4", "50%25 of #1?/deep #2.mp4", "a b+c.mp4"])
def test_absolute_and_relative_names_in_lists_are_keys_as_they_stand(
    server: FakeStore, videos: list[bytes], tmp_path: Path, name: str
) -> None:
    server.objects[f"lists/{name}"] = videos[0]
    for number, video in enumerate((f"s3://{BUCKET}/lists/{name}", name)):
        server.objects["lists/all.csv"] = f'video,caption\n"{video}",a caption\n'.encode()
        out = tmp_path / str(number)
        build_shards([f"s3://{BUCKET}/lists/all.csv"], out, OPTIONS, workers=0)
        assert _sources(out) == {name}


def test_what_a_list_names_is_not_looked_for_in_the_whole_folder(server: FakeStore, tmp_path: Path) -> None:
    """A folder of a bucket may hold a million objects beside them."""
    server.page = 1
    (tmp_path / "list.csv").write_text(f"video\ns3://{BUCKET}/v/a.mp4\ns3://{BUCKET}/v/z.mp4\n")
    assert len(find_sources([tmp_path / "list.csv"]).found) == len(server.requests) == 2
    assert find_sources([f"s3://{BUCKET}/v/a.mp4"]).found[0].text == "a.txt"
    assert not any("list-type" in request for request in server.requests)


def test_opening_a_dataset_lists_nothing(server: FakeStore) -> None:
    with pytest.raises(DataError, match=r"there is no manifest\.json"):
        open_dataset(f"s3://{BUCKET}/v")
    assert len(server.requests) == 1


def test_a_signed_url_in_a_list_is_refused_and_not_repeated(server: FakeStore, tmp_path: Path) -> None:
    server.objects["lists/all.csv"] = b"video\ns3://regen/v/a.mp4?X-Amz-Signature=hunter2\n"
    with pytest.raises(DataError, match=r"line 2: .*must not carry credentials") as refused:
        build_shards([f"s3://{BUCKET}/lists/all.csv"], tmp_path / "out", OPTIONS, workers=0)
    assert "hunter2" not in str(refused.value)


def test_a_video_with_an_odd_sign_can_be_named_alone(server: FakeStore, videos: list[bytes], tmp_path: Path) -> None:
    server.objects = {"v/a#b.mp4": videos[0]}
    build_shards([f"{URL}/a%23b.mp4"], tmp_path / "out", OPTIONS, workers=0)
    assert _sources(tmp_path / "out") == {"a#b.mp4"}
