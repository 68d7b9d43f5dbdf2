"""Reconstruction of a video file: a folder with videos, sheet and measures, whole or not at all; trivial decoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from regen_dist.errors import ConfigError, DataError, RegenError
from regen_dist.evaluation.metrics import VMAF_SIDE, Measurement, Options, Roundtrip, measure
from regen_dist.evaluation.reconstruct import LABELS, TRIVIAL_KINDS, TrivialCodec, reconstruct
from regen_dist.inference.codec import Window
from regen_dist.inference.frames import SourceVideo, VideoWriter
from regen_dist.inference.long_video import VideoCodec
from tests.helpers.video import ffmpeg, frame_numbers, numbered_frames
from tests.helpers.video import write_video as video_file

FILES = {"reconstruction.mp4", "side_by_side.mp4", "contact_sheet.png", "metrics.json"}


def make_video(path: Path, num_frames: int = 21, height: int = 33, width: int = 50) -> Path:
    """A soft blob that moves to the right on a gradient."""
    y, x = np.mgrid[0:height, 0:width]
    with VideoWriter(path, 20, crf=8, preset="ultrafast") as writer:
        for t in range(num_frames):
            blob = 120 * np.exp(-((x - 5 - 1.5 * t) ** 2 + (y - height / 2) ** 2) / 60)
            writer.write(np.stack([40 + blob, 60 + x, 90 + y], -1).clip(0, 255).astype(np.uint8))
    return path


def run(video: Path, out: Path, codec: VideoCodec | None = None, **options: Any) -> dict[str, Any]:
    codec = codec or TrivialCodec("blend", 9)
    return reconstruct(SourceVideo(video), codec, out, Options(**options), label="Blend", model={"run": "none"})


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "blob.mp4")


@pytest.fixture(scope="module")
def plain(video: Path) -> Measurement:
    return measure(Roundtrip(SourceVideo(video), TrivialCodec("blend", 9), Options()), with_vmaf=False)


def test_a_full_folder_of_temporary_files_is_named(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies for VMAF lie there; another --out would not help."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr(VideoWriter, "_add_stream", full)
    with pytest.raises(DataError, match=r"/source\.mp4 cannot be written: No space left; .*set TMPDIR to a folder"):
        measure(Roundtrip(SourceVideo(video), TrivialCodec("blend", 9), Options()))


def test_all_files(video: Path, tmp_path: Path) -> None:
    report = run(video, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == json.loads(json.dumps(report))
    alone, both = (SourceVideo(tmp_path / "out" / name) for name in ("reconstruction.mp4", "side_by_side.mp4"))
    assert alone.num_frames == both.num_frames == 21
    assert (alone.height, alone.width) == (34, 50)
    assert both.width == 104
    np.testing.assert_allclose(alone.timestamps, np.arange(21) / 20, atol=1e-4)
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 200
    assert 20 < report["psnr_db"] < 50
    assert 0.5 < report["ssim"] <= 1
    assert report["vmaf"] > 20
    assert report["windows"] == 3
    assert report["latent_bits_per_pixel"] == pytest.approx(3 * 2 * 3 * 40 * 56 * 16 / (21 * 34 * 50))
    assert report["compression"] == pytest.approx(24 / report["latent_bits_per_pixel"])
    assert report["seam_ratio_source"] == pytest.approx(1, abs=0.3)


def test_clips_begin_at_cuts(tmp_path: Path) -> None:
    """A hard cut in the middle of a clip is found, and neither side of it shows the other."""
    video, cut = tmp_path / "cut.mp4", 20
    with VideoWriter(video, 20, crf=8, preset="ultrafast") as writer:
        for number in range(40):
            colour = (200, 40, 30) if number < cut else (20, 60, 220)
            writer.write(np.full((48, 64, 3), colour, np.uint8))
    found, whole = (run(video, tmp_path / str(cuts), TrivialCodec("mean", 9), cuts=cuts) for cuts in (True, False))
    assert (found["video"]["cuts"], whole["video"]["cuts"]) == ([cut], [])
    assert found["psnr_db"] > 35 > 25 > whole["psnr_db"]


@pytest.mark.parametrize("fps", [40.0, 23.5, 7.0])
def test_another_rate(video: Path, plain: Measurement, tmp_path: Path, fps: float) -> None:
    other = run(video, tmp_path / "other", fps=fps)
    written = SourceVideo(tmp_path / "other" / "reconstruction.mp4")
    assert written.num_frames == int(fps) + 1  # the last of 21 frames at 20 fps is at 1.0 s
    assert float(written.rate) == pytest.approx(fps)
    assert SourceVideo(tmp_path / "other" / "side_by_side.mp4").num_frames == written.num_frames
    assert other["psnr_db"] == pytest.approx(plain.psnr_db)  # measured at the source's own times


def test_side_by_side_shows_the_source_of_the_time(video: Path, tmp_path: Path) -> None:
    run(video, tmp_path, fps=40.0)
    source = list(SourceVideo(video).frames())
    both = list(SourceVideo(tmp_path / "side_by_side.mp4").frames())
    for index in (0, 7, 20, 39, 40):
        left = both[index][:, :50].astype(int)
        distances = [np.abs(left - frame).mean() for frame in source]
        assert int(np.argmin(distances)) == index // 2


def test_each_source_frame_is_shown_where_times_are_rounded(tmp_path: Path) -> None:
    path = video_file(tmp_path / "numbered.mkv", numbered_frames(33), fps=24)
    run(path, tmp_path, fps=24.0)
    both = np.stack(list(SourceVideo(tmp_path / "side_by_side.mp4").frames()))
    assert frame_numbers(both[:, :, :64].transpose(3, 0, 1, 2)) == list(range(33))


@pytest.mark.parametrize("num_frames", [1, 2, 9, 12])
def test_short_videos(tmp_path: Path, num_frames: int) -> None:
    report = run(make_video(tmp_path / "short.mp4", num_frames), tmp_path / "out")
    assert report["video"]["frames"] == num_frames
    assert SourceVideo(tmp_path / "out" / "reconstruction.mp4").num_frames == num_frames
    assert (report["seam_ratio"] is None) == (num_frames < 10)


def test_small_frames_have_no_ssim_and_no_vmaf_and_say_so(tmp_path: Path) -> None:
    report = run(make_video(tmp_path / "small.mp4", 3, 8, 10), tmp_path / "out")
    assert report["ssim"] is report["vmaf"] is report["seam_ratio"] is None
    assert list(report["notes"]) == [
        "VMAF: it needs 17 pixels a side, found 8x10",
        "SSIM: its window of 11 pixels does not fit 8x10",
        "seam ratio: the video is one clip",
    ]


def test_the_smallest_frames_that_have_a_vmaf(tmp_path: Path) -> None:
    report = run(make_video(tmp_path / "small.mp4", 3, VMAF_SIDE, VMAF_SIDE), tmp_path / "out")
    assert report["vmaf"] is not None


def test_frames_too_wide_for_the_side_by_side_video(tmp_path: Path) -> None:
    """Found before the first clip is encoded; the encoder's error named the disk."""
    wide = make_video(tmp_path / "wide.mp4", 2, 2, 8192)
    with pytest.raises(DataError, match=r"side_by_side\.mp4 would have frames of 2x16388; .*at most 16384 pixels"):
        run(wide, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_resized_source(video: Path, tmp_path: Path) -> None:
    source = SourceVideo(video, short_side=24, max_frames=10)
    codec = TrivialCodec("mean", 9)
    report = reconstruct(source, codec, tmp_path, Options(), label="Mean", model={}, compare=True)
    assert (report["video"]["height"], report["video"]["stored_height"]) == (24, 34)
    assert report["video"]["frames"] == 10
    assert report["trivial"]["mean"]["psnr_db"] == pytest.approx(report["psnr_db"])
    assert report["trivial"]["blend"]["psnr_db"] > report["trivial"]["mean"]["psnr_db"]


def test_what_was_converted_on_reading_is_recorded(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=32x24:rate=10", "-t", "0.3", "-vf", "setsar=2", tmp_path / "wide.mp4")
    report = run(tmp_path / "wide.mp4", tmp_path / "out")
    assert report["video"]["notes"] == ["non-square pixels: of 2:1, 24x32 scaled to 24x64"]


def test_a_lossless_codec_is_measured_as_one(video: Path) -> None:
    """A clip of two frames is kept whole by blending first and last."""
    measurement = measure(Roundtrip(SourceVideo(video), TrivialCodec("blend", 2), Options()))
    assert measurement.psnr_db == 100
    assert measurement.ssim == pytest.approx(1)
    assert measurement.vmaf is not None
    assert measurement.vmaf > 90


class Broken(TrivialCodec):
    """Fails in the middle of a video."""

    def encode(self, clips: Tensor) -> Any:
        raise RuntimeError("broken")


class Halfway(TrivialCodec):
    """Decodes once, then fails."""

    calls = 0

    def decode_windows(self, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("broken halfway")
        return super().decode_windows(*arguments, **options)


@pytest.mark.parametrize("codec", [Broken("mean", 9), Halfway("mean", 5)])
def test_nothing_half_written_stays(video: Path, tmp_path: Path, codec: TrivialCodec) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        run(video, tmp_path / "out", codec)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_earlier_result_outlives_a_failure(video: Path, tmp_path: Path) -> None:
    run(video, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="broken"):
        run(video, tmp_path, Halfway("mean", 5))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_earlier_measures_never_describe_new_videos(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the videos and metrics.json, which says that all is there."""
    run(video, tmp_path)
    monkeypatch.setattr("regen_dist.evaluation.reconstruct.write_sheet", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(video, tmp_path, TrivialCodec("mean", 5))
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"fps": 0.0}, {"fps": -3.0}, {"fps": float("nan")}, {"overlap": 9}, {"overlap": -1}]
)
def test_wrong_options(video: Path, tmp_path: Path, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"steps|fps|overlap"):
        run(video, tmp_path / "out", **options)


def test_the_baseline_has_no_frames_between(video: Path, tmp_path: Path) -> None:
    codec = TrivialCodec("blend", 9)
    codec.kind = "magvit2"
    with pytest.raises(ConfigError, match="magvit2 baseline"):
        run(video, tmp_path / "out", codec, fps=40.0)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(video: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be made"):
        run(video, tmp_path / "file" / "out")


def test_a_source_is_not_replaced(video: Path, tmp_path: Path) -> None:
    """An earlier reconstruction that is reconstructed again."""
    source = Path(shutil.copy(video, tmp_path / "reconstruction.mp4"))
    with pytest.raises(DataError, match="would be replaced by its reconstruction; choose another --out"):
        run(source, tmp_path)
    assert source.read_bytes() == video.read_bytes()


def test_a_missing_video(tmp_path: Path) -> None:
    with pytest.raises(RegenError, match="no such file"):
        run(tmp_path / "missing.mp4", tmp_path / "out")


def test_seconds_are_kept_for_variable_rates(tmp_path: Path) -> None:
    seconds = np.cumsum([0, 0.04, 0.2, 0.04, 0.04, 0.5, 0.04, 0.04, 0.04, 0.04, 0.04])
    with VideoWriter(tmp_path / "variable.mp4", 10, crf=8, preset="ultrafast") as writer:
        for t, at in enumerate(seconds):
            writer.write(np.full((16, 16, 3), 20 * t, np.uint8), float(at))
    run(tmp_path / "variable.mp4", tmp_path / "out")
    written = SourceVideo(tmp_path / "out" / "reconstruction.mp4")
    np.testing.assert_allclose(written.timestamps, seconds, atol=1e-3)


# The trivial decoders do what their names say.


def decode(kind: str, clip: torch.Tensor) -> list[float]:
    codec = TrivialCodec(kind, clip.shape[2])  # type: ignore[arg-type]
    window = Window(codec.encode(clip), 0.0, clip.shape[2])
    return codec.decode_windows([window], torch.arange(clip.shape[2]))[0, 0, :, 0, 0].tolist()


def test_each_kind() -> None:
    clip = torch.tensor([0.0, 1.0, 0.0, 0.5, 0.4]).view(1, 1, 5, 1, 1).expand(1, 3, 5, 8, 8)
    assert decode("repeat_first", clip) == [0.0] * 5
    assert decode("blend", clip) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert decode("mean", clip) == pytest.approx([0.38] * 5)
    assert set(LABELS) == set(TRIVIAL_KINDS)


def test_an_image_is_kept() -> None:
    for kind in TRIVIAL_KINDS:
        assert decode(kind, torch.full((1, 3, 1, 8, 8), 0.25)) == [0.25]


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="repeat_first, blend, mean"):
        TrivialCodec("nearest", 9)  # type: ignore[arg-type]
