"""Building and indexing what a player shows otherwise than it is stored; odd names, odd rates, odd options."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from regen_dist.data.build.build import build_shards
from regen_dist.data.build.foreign import index_tars
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.build.sources import find_sources
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.manifest import DatasetManifest, read_manifest
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.data.storage.store import Store
from regen_dist.data.video.conversion import LeftOut
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import DataError
from regen_dist.inference.frames import SourceVideo, write_video
from tests.helpers.ffmpeg import H264, PATTERN, ffmpeg

OPTIONS = {"short_side": 64, "min_frames": 4, "segment_seconds": 10.0}
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
    manifest = build_shards([sources], tmp_path, BuildOptions(**OPTIONS, keep=keep), workers=0).manifest  # type: ignore[arg-type]
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
    options = BuildOptions(**OPTIONS, hdr="leave-out", interlaced="leave-out")  # type: ignore[arg-type]
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
    manifest = build_shards(["."], tmp_path / "out", BuildOptions(**OPTIONS), workers=0).manifest  # type: ignore[arg-type]
    assert manifest is not None
    assert manifest.totals.samples == 1
    write_video(Path(f"out {name}"), SourceVideo(Path(name)).frames(), 24)
    assert SourceVideo(Path(f"out {name}")).num_frames == 12


@pytest.mark.parametrize("text", ["CLIP.TXT", "CLIP.txt", "clip.txt"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_caption_belongs_to_its_video_in_any_case(tmp_path: Path, text: str, alone: bool) -> None:
    (tmp_path / "CLIP.MP4").write_bytes(b"video")
    (tmp_path / text).write_text("A street")
    (source,) = find_sources([tmp_path / "CLIP.MP4" if alone else tmp_path]).found
    assert source.text == text
