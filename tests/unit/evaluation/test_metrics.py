"""The measures equal their formulas on cases that can be worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image

from regen_dist.data.video.colour import Primaries, Transfer
from regen_dist.data.video.conversion import BT709_MATRIX, FULL_RANGE, LIMITED_RANGE, RESIZE
from regen_dist.errors import DataError
from regen_dist.evaluation.metrics import PSNR_CEILING, VideoMeter, bits_per_pixel, psnr_db, seam_ratio, ssim, vmaf
from regen_dist.evaluation.sheet import MAGMA, write_sheet
from regen_dist.inference.frames import VideoWriter


def flat(value: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def test_psnr_of_the_whole_video_and_mean_over_frames() -> None:
    meter = VideoMeter()
    meter.add(flat(100), flat(101))
    meter.add(flat(100), flat(110))
    assert meter.psnr_db == pytest.approx(10 * np.log10(255**2 / 50.5))
    assert meter.psnr_mean_over_frames_db == pytest.approx((48.1308 + 28.1308) / 2, abs=1e-3)
    assert meter.psnr_mean_over_frames_db >= meter.psnr_db


def test_equal_frames_have_a_finite_psnr() -> None:
    meter = VideoMeter()
    meter.add(flat(7), flat(7))
    assert meter.psnr_db == meter.psnr_mean_over_frames_db == PSNR_CEILING == psnr_db(0.0)
    assert meter.ssim == pytest.approx(1.0)


def test_errors_do_not_wrap_around() -> None:
    meter = VideoMeter()
    meter.add(flat(0), flat(255))
    assert meter.psnr_db == pytest.approx(0.0)


def test_ssim_falls_with_noise_and_needs_its_window() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
    noisy = np.clip(picture + rng.normal(0, 40, picture.shape), 0, 255).astype(np.uint8)
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert 0.3 < (ssim(picture, noisy) or 0) < 0.95
    assert ssim(flat(1, side=8), flat(1, side=8)) is None


def test_sides_must_agree() -> None:
    with pytest.raises(DataError, match="cannot be compared"):
        VideoMeter().add(flat(0, 16), flat(0, 24))


def test_seam_ratio() -> None:
    assert seam_ratio([1, 1, 3, 1], [False, False, True, False]) == pytest.approx(3.0)
    assert seam_ratio([2, 2, 2, 2], [False, True, False, True]) == pytest.approx(1.0)
    assert seam_ratio([1, 1], [True, True]) is None
    assert seam_ratio([1, 1], [False, False]) is None
    assert seam_ratio([0, 1], [False, True]) is None


def test_changes_are_means_of_absolute_differences() -> None:
    meter = VideoMeter()
    for value in (10, 13, 3):
        meter.add(flat(value), flat(2 * value))
    assert meter.source_changes == [3, 10]
    assert meter.changes == [6, 20]


def test_bits_per_pixel() -> None:
    # 9 frames of 64 x 64 in two latent frames of 8 channels, 8 x 8 cells: 1024 values of 16 bits
    assert bits_per_pixel(2 * 8 * 8 * 8, 9, 64, 64) == pytest.approx(1024 * 16 / (9 * 64 * 64))


def test_vmaf(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / "good.mp4", tmp_path / "bad.mp4"]
    coarse = rng.integers(0, 255, (12, 12, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    for path, crf in zip(paths, (0, 45), strict=True):
        with VideoWriter(path, 25, crf=crf, preset="ultrafast") as writer:
            for t in range(4):
                writer.write(np.roll(coarse, 3 * t, 1))
    same, worse = vmaf(paths[0], paths[0]), vmaf(paths[0], paths[1])
    assert same.score is not None
    assert worse.score is not None
    assert same.score > 90 > worse.score


def test_vmaf_says_why_it_has_no_score(tmp_path: Path) -> None:
    missing = tmp_path / "missing.mp4"
    for executable in (None, "/bin/false", str(tmp_path / "no-ffmpeg")):
        result = vmaf(missing, missing, executable=executable)
        assert result.score is None
        assert result.reason


def test_without_the_extra_vmaf_is_left_out_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    found = vmaf(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert found.score is None
    assert found.reason.endswith("pip install 'regen-dist[eval]'")


def test_the_colours_of_error_maps_are_those_of_magma() -> None:
    magma = pytest.importorskip("matplotlib").colormaps["magma"](np.arange(256))
    np.testing.assert_array_equal(MAGMA, (magma[:, :3] * 255).round())


def test_numbers_of_colours_and_scaling_are_those_of_ffmpeg() -> None:
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
    assert flags | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP == RESIZE
    assert {each.name: int(each) for each in Primaries} == {
        each.name: int(ColorPrimaries[each.name]) for each in Primaries
    }
    assert {each.name: int(each) for each in Transfer} == {each.name: int(ColorTrc[each.name]) for each in Transfer}
    assert (LIMITED_RANGE, FULL_RANGE, BT709_MATRIX) == (ColorRange.MPEG, ColorRange.JPEG, Colorspace.ITU709)


def test_the_title_of_a_sheet_of_one_frame_is_whole(tmp_path: Path) -> None:
    heads = []
    for number in (1, 6):
        frames = [flat(100, 64)] * number
        sheet = tmp_path / f"{number}.png"
        write_sheet(sheet, range(number), frames, {"decoder": frames}, title="a.mp4   27.31 dB, 2.073 bits per pixel")
        with Image.open(sheet) as image:
            heads.append(np.asarray(image)[:60].min(axis=(0, 2)))  # the darkest of each column
    written = [np.flatnonzero(head < 128) for head in heads]
    assert len(written[1]) > 100
    np.testing.assert_array_equal(*written)
