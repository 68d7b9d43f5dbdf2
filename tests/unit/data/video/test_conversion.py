"""Frames as a player shows them: square pixels, BT.709 of standard range, no fields; whatever way they are reached."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from regen_dist.data.video.colour import hlg_light, pq_light, pq_signal, to_bt709, to_standard, tone_curve
from regen_dist.data.video.conversion import Converter, frame_to_rgb
from regen_dist.data.video.reader import VideoReader
from regen_dist.data.video.transcode import EncodeOptions, Segment, encode_segments, probe_video
from regen_dist.errors import ConfigError, DataError
from regen_dist.inference.frames import SourceVideo
from tests.helpers.video import H264, PATTERN, UInt8s, ffmpeg, shown_frames

PQ, HLG, SDR = "smpte2084", "arib-std-b67", "bt709"
_NPL = "npl=100"  # cd/m² of SDR's white: what zscale takes, too, when it is not told


def read_all(source: Path | bytes) -> UInt8s:
    with VideoReader(source) as reader:
        return np.stack([frame_to_rgb(frame) for _, frame in reader.frames(range(len(reader.table.pts)))])


def transcoded(path: Path, short_side: int | None = None) -> bytes:
    with VideoReader(path) as reader:
        frames = len(reader.table.pts)
    (made,) = encode_segments(path, [Segment("x", 0, 0, frames)], EncodeOptions(short_side, 10, keep=False))
    assert not made.problem
    return made.data


def tags(data: bytes) -> tuple[int, int, int, int]:
    """Matrix, primaries, transfer, range."""
    with VideoReader(data) as reader:
        (_, frame), *_ = reader.frames([0])
        return frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range


def hdr_grey(path: Path, grey: int, transfer: str, *more: str) -> Path:
    """A grey of SDR (display light), as BT.2020 in PQ or HLG with ten bits."""
    source = f"color=c=0x{grey:02x}{grey:02x}{grey:02x}:size=96x64:rate=24:duration=0.5,format=gbrp"
    sdr = "setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"
    chain = f"{source},{sdr},zscale=transfer={transfer}:primaries=bt2020:matrix=bt2020nc:range=tv:{_NPL}"
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        f"{chain},format=yuv420p10le",
        "-c:v",
        "libx265",
        "-x265-params",
        "log-level=error",
        *more,
        path,
    )
    return path


# --- square pixels


@pytest.mark.parametrize(
    ("aspect", "suffix", "size"),
    [("4/3", "mp4", (128, 256)), ("3/4", "mkv", (171, 192)), ("32/27", "mpg", (128, 228)), ("1", "mp4", (128, 192))],
)
def test_pixels_are_square_wherever_a_video_is_read(
    tmp_path: Path, aspect: str, suffix: str, size: tuple[int, int]
) -> None:
    codec = ("-c:v", "mpeg2video", "-q:v", "2", "-aspect", "16:9") if suffix == "mpg" else H264
    path = tmp_path / f"a.{suffix}"
    ffmpeg(*PATTERN, "-t", "0.5", "-vf", f"setsar={aspect}", *codec, path)
    with VideoReader(path) as reader:
        info = reader.info()
        assert (info.height, info.width) == size
        assert [note.partition(":")[0] for note in reader.notes] == ["non-square pixels"] * (aspect != "1")
    source = SourceVideo(path)
    assert (source.height, source.width) == source.stored == size
    ours, theirs = read_all(path), shown_frames(path, *size)
    assert (
        np.abs(ours.astype(int) - theirs[: len(ours)]).mean() < 4
    )  # upsampling of chroma differs by 2.9 between versions of swscale
    with VideoReader(transcoded(path, short_side=64)) as reader:
        info = reader.info()
        assert info.width / info.height == pytest.approx(size[1] / size[0], abs=0.03)
        assert not reader.notes


def test_pixels_of_absurd_shape_are_refused() -> None:
    with pytest.raises(DataError, match="setsar=1"):
        Converter()(av.VideoFrame(640, 480, "yuv420p"), Fraction(1000, 1))


# --- colours


def test_light_of_signals_is_that_of_the_standards() -> None:
    """BT.2408, table 1 and 2: reference white is 58 % in PQ, 75 % in HLG; PQ's ends; HLG's peak."""
    assert pq_light(np.array([0, 1.0])) == pytest.approx([0, 10_000])
    assert pq_signal(np.array([100.0, 203.0, 1000.0])) == pytest.approx([0.508, 0.581, 0.752], abs=6e-4)
    assert pq_light(pq_signal(np.array([0.1, 49.0, 4000.0]))) == pytest.approx([0.1, 49.0, 4000.0])
    assert hlg_light(np.full((2, 3), [[0.75], [1.0]])).mean(-1) == pytest.approx([203, 1000], rel=5e-3)
    white, red = to_bt709(9) @ np.ones(3), to_bt709(9) @ np.array([1.0, 0, 0])
    assert white == pytest.approx([1, 1, 1], abs=1e-6)
    assert red == pytest.approx([1.6605, -0.1246, -0.0182], abs=5e-4)  # BT.2087
    assert to_bt709(12) @ np.array([1.0, 0, 0]) == pytest.approx([1.2249, -0.0420, -0.0196], abs=1e-3)
    assert to_bt709(11) @ np.ones(3) == pytest.approx([1, 1, 1], abs=1e-6)


def test_the_tone_curve_rises_and_keeps_what_is_dark() -> None:
    light = np.linspace(0, 1000, 2001)
    curve = tone_curve(light)
    assert (np.diff(curve) > 0).all()
    assert curve[light < 20] == pytest.approx(light[light < 20])
    assert curve[-1] == pytest.approx(100)
    assert tone_curve(np.array([9000.0])) == pytest.approx([100])


def test_colours_keep_their_hue_and_stay_in_range() -> None:
    green = to_standard(np.array([[0.3, 0.75, 0.2], [0.0, 0.75, 0.0]]), 16, 9)
    assert ((green >= 0) & (green <= 1)).all()
    assert (green[:, 1] > 1.5 * green[:, [0, 2]].max(1)).all()


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize("grey", [40, 110, 190])
def test_a_grey_of_hdr_is_the_grey_of_sdr(tmp_path: Path, transfer: str, grey: int) -> None:
    path = hdr_grey(tmp_path / "a.mp4", grey, transfer)
    assert read_all(path).mean() == pytest.approx(grey, abs=8)
    data = transcoded(path)
    assert tags(data) == (1, 1, 1, 1)
    assert read_all(data).mean() == pytest.approx(grey, abs=8)
    with VideoReader(data) as reader:
        assert [reader.info().frames, *reader.notes] == [12]


def test_a_full_folder_of_temporary_files_is_no_fault_of_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build left out every HDR video as unreadable."""
    path = hdr_grey(tmp_path / "a.mp4", 110, PQ)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"No such file or directory.* set TMPDIR to a folder with room"):
        read_all(path)
    with pytest.raises(ConfigError, match="set TMPDIR"):
        probe_video(path)


def test_wide_primaries_of_standard_range_become_bt709(tmp_path: Path) -> None:
    """A BT.709 colour, written in BT.2020 and in P3, comes back as it was."""
    for primaries, matrix in (("bt2020", "bt2020nc"), ("smpte432", "bt709")):
        path = tmp_path / f"{primaries}.mp4"
        sdr = "setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"
        colour = f"color=c=0xc05028:size=96x64:rate=24:duration=0.5,format=gbrp,{sdr}"
        chain = f"{colour},zscale=transfer=bt709:primaries={primaries}:matrix={matrix}:range=tv,format=yuv444p10le"
        ffmpeg("-f", "lavfi", "-i", chain, "-c:v", "libx265", "-x265-params", "log-level=error:lossless=1", path)
        assert np.abs(read_all(path).mean((0, 1, 2)) - [0xC0, 0x50, 0x28]).max() < 4
        assert tags(transcoded(path)) == (1, 1, 1, 1)


def test_rgb_sources_are_stored_as_what_their_tags_say(tmp_path: Path) -> None:
    for name, codec in (("a.mkv", "ffv1"), ("a.gif", "gif")):
        path = tmp_path / name
        source = ("-f", "lavfi", "-i", "color=c=0x2050d0:size=96x64:rate=10:duration=0.5,format=gbrp")
        ffmpeg(*source, "-c:v", codec, *(("-pix_fmt", "gbrp") if codec == "ffv1" else ()), path)
        data = transcoded(path)
        matrix, primaries, transfer, _ = tags(data)
        assert (matrix, primaries) == (1, 1)
        assert transfer in (1, 13)
        stored = tmp_path / "stored.mp4"
        stored.write_bytes(data)
        assert np.abs(shown_frames(stored, 64, 96).mean((0, 1, 2)) - [0x20, 0x50, 0xD0]).max() < 4


def test_turned_videos_keep_their_colours_too(tmp_path: Path) -> None:
    flat, turned = tmp_path / "flat.mp4", tmp_path / "turned.mp4"
    colour = "color=c=0x20c040:size=96x64:rate=24:duration=0.5,format=gbrp"
    ffmpeg("-f", "lavfi", "-i", colour, "-vf", "scale=out_color_matrix=bt709,setparams=colorspace=bt709", *H264, flat)
    ffmpeg("-display_rotation", "90", "-i", flat, "-c", "copy", turned)
    stored = tmp_path / "stored.mp4"
    stored.write_bytes(transcoded(turned))
    assert np.abs(shown_frames(stored, 96, 64).mean((0, 1, 2)) - [0x20, 0xC0, 0x40]).max() < 4


@pytest.mark.parametrize("kind", ["R'G'B'", "turned", "JPEG"])
def test_chroma_stays_where_it_is(tmp_path: Path, kind: str) -> None:
    """Untagged, H.264 means the left edge of two pixels; in these it lies in their middle, half a pixel aside."""
    waves = np.sin(np.add.outer(np.arange(64), np.arange(96)) * 2 * np.pi / 16)
    Image.fromarray((128 + 90 * waves[..., None] * [1, -0.5, 0]).round().astype(np.uint8)).save(tmp_path / "a.png")
    codecs = {"R'G'B'": "png", "turned": "libx264 -qp 0 -pix_fmt yuv444p", "JPEG": "mjpeg -q:v 1 -pix_fmt yuvj420p"}
    flat, path = tmp_path / "flat.mov", tmp_path / "a.mov"
    ffmpeg("-i", tmp_path / "a.png", "-c:v", *codecs[kind].split(), flat)
    ffmpeg("-display_rotation", "90" if kind == "turned" else "0", "-i", flat, "-c", "copy", path)
    difference = read_all(path).astype(float) - read_all(transcoded(path))
    assert np.square(difference[:, 8:-8, 8:-8]).mean() < 30


def test_a_matrix_that_cannot_be_read_is_named() -> None:
    frame = av.VideoFrame(64, 64, "yuv420p10le")
    frame.colorspace = 14
    with pytest.raises(DataError, match="ICtCp"):
        Converter()(frame)


# --- fields


def combing(frames: UInt8s) -> float:
    """How much neighbouring rows differ more than rows of one field: near 0 without fields, large with them."""
    rows = frames.astype(int).mean(-1)
    near = np.abs(rows[:, 1:] - rows[:, :-1]).mean()
    return float(near - np.abs(rows[:, 2:] - rows[:, :-2]).mean() / 2)


def interlaced(path: Path, order: str = "tff") -> Path:
    codec = {
        ".mp4": (*H264, "-flags", "+ilme+ildct", "-x264-params", f"{order}=1:keyint=12"),
        ".mpg": ("-c:v", "mpeg2video", "-q:v", "2", "-flags", "+ilme+ildct", "-bf", "0"),
        ".mov": ("-c:v", "prores_ks", "-flags", "+ildct"),
    }[path.suffix]
    source = "testsrc2=size=192x128:rate=48:duration=1.5"
    ffmpeg("-f", "lavfi", "-i", source, "-vf", f"interlace=scan={order}:lowpass=0,setfield={order}", *codec, path)
    return path


@pytest.mark.parametrize(("name", "order"), [("a.mp4", "tff"), ("b.mp4", "bff"), ("a.mov", "tff")])
def test_fields_are_joined_as_ffmpeg_does_it(tmp_path: Path, name: str, order: str) -> None:
    path = interlaced(tmp_path / name, order)
    pixels = ("-f", "rawvideo", "-pix_fmt", "gray", "-fps_mode", "passthrough")
    raw = ffmpeg("-i", path, "-vf", "bwdif=mode=send_frame,format=yuv420p,extractplanes=y", *pixels, "-")
    with VideoReader(path) as reader:
        luma = [frame.reformat(format="yuv420p").to_ndarray()[:128] for _, frame in reader.frames(range(36))]
    difference = np.abs(np.stack(luma).astype(int) - np.frombuffer(raw, np.uint8).reshape(-1, 128, 192))
    assert difference.mean((1, 2)).max() < (1 if name == "a.mov" else 0.5)  # ten bits to eight round differently
    ours = read_all(path)
    with VideoReader(path, convert=False) as reader:
        combed = np.stack([frame_to_rgb(frame) for _, frame in reader.frames(range(len(ours)))])
    assert combing(ours) < combing(combed) - 1
    with VideoReader(transcoded(path)) as reader:
        (_, frame), *_ = reader.frames([0])
        assert not frame.interlaced_frame
        assert not reader.notes


def test_a_deinterlaced_frame_is_the_same_however_it_is_reached(tmp_path: Path) -> None:
    path = interlaced(tmp_path / "a.mp4")
    whole = read_all(path)
    with VideoReader(path) as reader:
        for numbers in ([0], [35], [11, 12, 13], [3, 17, 18, 30], [1, 3, 5, 7]):
            for number, frame in reader.frames(numbers):
                assert np.array_equal(frame_to_rgb(frame), whole[number]), number
        assert reader.notes == ("interlaced: frames of two fields, deinterlaced by bwdif",)
