"""The video reader: frames by number and time, streams, rotation, and errors of damaged files."""

from __future__ import annotations

import struct
import subprocess
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import obstore
import pytest
from obstore.store import MemoryStore

from regen_dist.data.video.conversion import RESIZE, Geometry, UInt8s, fit_geometry, frame_to_planes, frame_to_rgb
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.data.video.transcode import EncodeOptions, Segment, encode_segments, probe_video
from regen_dist.errors import DataError
from tests.helpers.video import H264, PATTERN, ffmpeg, frame_numbers, moving_square, numbered_frames, write_video

WHOLE = Geometry(48, 64, 0, 0, (48, 64))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(
        tmp_path_factory.mktemp("video") / "numbered.mp4", numbered_frames(100), crf=2, keyframe_interval=30
    )


@pytest.mark.parametrize(
    "wanted", [range(9), range(91, 100), range(29, 32), range(28, 65, 4), range(99, 100), [3, 31, 32, 98]]
)
def test_frames_are_the_ones_asked_for(numbered: Path, wanted: range | list[int]) -> None:
    for source in (numbered, numbered.read_bytes()):
        with VideoReader(source) as reader:
            assert frame_numbers(read_clip(reader, wanted, WHOLE)) == list(wanted)


def test_one_reader_serves_any_order_of_requests(numbered: Path) -> None:
    with VideoReader(numbered.read_bytes()) as reader:
        for start in (80, 3, 45, 0):
            assert frame_numbers(read_clip(reader, range(start, start + 5), WHOLE)) == list(range(start, start + 5))


# Groups of pictures that lean on their neighbours, frames that only some others refer to, frames in halves, no
# keyframes but in slices, time of presentation apart from decoding, other codecs and containers.
ENCODINGS = {
    "pyramid.mp4": {"x264": "bframes=6:b-pyramid=normal:ref=4:weightb=1:direct=temporal"},
    "open.mp4": {"x264": "open-gop=1"},
    "open.ts": {"x264": "open-gop=1"},
    "open.mkv": {"x264": "open-gop=1"},
    "refresh.mp4": {"x264": "intra-refresh=1:bframes=0"},
    "interlaced.mp4": {"x264": "tff=1"},
    "plain.flv": {},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "vp9.webm": {"codec": "libvpx-vp9"},
}


@pytest.fixture(scope="module")
def busy() -> UInt8s:
    """Movement over noise that moves too: nothing is ever copied from the frame before unchanged."""
    noise = np.random.default_rng(0).integers(0, 90, (90, 48, 64, 3), dtype=np.uint8)
    return moving_square(90, 48, 64) // 2 + noise


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_clip_is_exactly_what_decoding_everything_gives(tmp_path: Path, busy: UInt8s, name: str) -> None:
    path = write_video(tmp_path / name, busy, keyframe_interval=20, **ENCODINGS[name])  # type: ignore[arg-type]
    with av.open(str(path)) as container:
        expected = {frame.pts: frame.to_ndarray() for frame in container.decode(video=0)}
    with VideoReader(path.read_bytes(), convert=False) as reader:
        assert list(reader.table.pts) == sorted(pts for pts in expected if pts is not None)
        for start, stride, length in (
            (0, 1, 90),
            (19, 1, 9),
            (20, 1, 1),
            (39, 2, 9),
            (41, 3, 9),
            (7, 7, 12),
            (81, 1, 9),
        ):
            wanted = range(start, start + stride * length, stride)
            found = {number: frame.to_ndarray() for number, frame in reader.frames(wanted)}
            assert list(found) == list(wanted)
            assert all(np.array_equal(found[number], expected[reader.table.pts[number]]) for number in wanted)


class Counted(VideoReader):
    """Counts packets given to the decoder and frames that came out of it."""

    packets = decoded = 0

    def _packets(self, group: int) -> Iterator[av.Packet[av.VideoStream]]:
        for packet in super()._packets(group):
            self.packets += 1
            yield packet

    def _decode_lean(self, *arguments: object) -> Iterator[av.VideoFrame]:
        for frame in super()._decode_lean(*arguments):  # type: ignore[arg-type]
            self.decoded += 1
            yield frame


def test_only_the_groups_of_pictures_that_are_needed_are_decoded(tmp_path: Path, busy: UInt8s) -> None:
    path = write_video(tmp_path / "video.mp4", busy, keyframe_interval=30, x264="scenecut=0")
    with Counted(path.read_bytes()) as reader:
        assert [number for number, _ in reader.frames(range(60, 69))] == list(range(60, 69))
        assert reader.packets <= 9 + 3  # a keyframe is a start: 60 frames before are not touched, none after decoded
        assert reader.decoded <= 9 + 1
        reader.packets = reader.decoded = 0
        list(reader.frames(range(75, 80)))
        assert reader.packets <= 20 + 3
        assert 5 <= reader.decoded < 20  # of the 15 frames before, only those that others refer to
        reader.packets = reader.decoded = 0
        assert [number for number, _ in reader.frames([1, 61, 62])] == [1, 61, 62]
        assert reader.packets <= 12  # the group between is jumped over
        assert list(reader.frames([5, 5])) != []


def test_a_number_that_comes_again_is_decoded_once(numbered: Path) -> None:
    numbers = [28, 28, 29, 31, 31, 31, 95]
    with Counted(numbered.read_bytes()) as reader:
        assert frame_numbers(read_clip(reader, numbers, WHOLE)) == numbers
        assert [number for number, _ in reader.frames(numbers)] == [28, 29, 31, 95]


def test_any_buffer_is_read_in_place(numbered: Path) -> None:
    data = numbered.read_bytes()
    padding = 32 << 20  # a box that says of itself that it can be left out
    large = np.frombuffer(data + struct.pack(">I4s", padding, b"free") + bytes(padding - 8), np.uint8)
    for source in (bytearray(data), memoryview(data), large.data, obstore_bytes(data)):
        tracemalloc.start()
        with VideoReader(source) as reader:
            assert frame_numbers(read_clip(reader, range(40, 45), WHOLE)) == list(range(40, 45))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20


def obstore_bytes(data: bytes) -> obstore.Bytes:
    """Bytes in the type that a request to a store returns."""
    store = MemoryStore()
    obstore.put(store, "video", data)
    return obstore.get_range(store, "video", start=0, length=len(data))


def test_variable_frame_rate_is_read_by_timestamps(tmp_path: Path) -> None:
    ticks = np.cumsum(np.random.default_rng(0).integers(10, 200, 60)).tolist()
    path = write_video(tmp_path / "variable.mp4", numbered_frames(60), crf=2, keyframe_interval=10, ticks=ticks)
    with VideoReader(path) as reader:
        assert len(reader.table.pts) == 60
        assert frame_numbers(read_clip(reader, range(37, 46), WHOLE)) == list(range(37, 46))


def test_cutting_keeps_frames_and_timing(numbered: Path) -> None:
    segments = [Segment("a", 0, 10, 45), Segment("b", 1, 45, 80)]
    for result in encode_segments(numbered, segments, EncodeOptions(None, 4, keep=False)):
        assert result.problem == ""
        assert result.info is not None
        assert (result.info.frames, result.info.height, result.info.width, result.info.fps) == (35, 48, 64, 24.0)
        with VideoReader(result.data) as reader:
            assert reader.table.pts[0] == 0
            assert len(reader.table.keyframes) == 3  # every 12 frames: clips are read at random places
            expected = list(range(result.segment.start, result.segment.stop))
            assert frame_numbers(read_clip(reader, range(35), WHOLE)) == expected


def test_cutting_alone_or_together_gives_the_same_bytes(numbered: Path) -> None:
    segments, options = [Segment("a", 0, 10, 45), Segment("b", 1, 45, 80)], EncodeOptions(32, 20, keep=False)
    together = encode_segments(numbered, segments, options)
    alone = [encode_segments(numbered, [segment], options)[0] for segment in segments]
    assert [result.data for result in together] == [result.data for result in alone]


def test_colours_survive_encoding(tmp_path: Path) -> None:
    frames = np.zeros((12, 64, 96, 3), dtype=np.uint8)
    colours = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 210]])
    for index, colour in enumerate(colours):
        frames[:, :, 32 * index : 32 * index + 32] = colour
    path = write_video(tmp_path / "colours.mp4", frames, crf=2)
    (result,) = encode_segments(path, [Segment("a", 0, 0, 12)], EncodeOptions(32, 8, keep=False))
    with VideoReader(result.data) as reader:
        clip = read_clip(reader, [6], Geometry(64, 96, 0, 0, (64, 96)))
    centres = clip[:, 0, 32, [16, 48, 80]].T.astype(int)
    assert np.abs(centres - colours).max() <= 4


def test_709_tags_are_followed_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "tagged.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "4", "color_range": "tv"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        for index in range(12):
            frame = av.VideoFrame(64, 64, "yuv420p")
            for plane, value in zip(frame.planes, (100, 100, 180), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts, frame.time_base, frame.colorspace = index, Fraction(1, 24), 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (result,) = encode_segments(path, [Segment("a", 0, 0, 12)], EncodeOptions(None, 4, keep=False))
    for source in (path, result.data):
        with VideoReader(source) as reader:
            ((_, frame),) = reader.frames([3])
            assert np.abs(frame_to_rgb(frame)[32, 32].astype(int) - [191, 76, 39]).max() <= 2  # BT.601: [181, 66, 41]


def test_reducing_filters_first(tmp_path: Path) -> None:
    stripes = np.zeros((5, 128, 128, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255  # finer than the reduced picture can show: without a filter it turns black, white or moiré
    path = write_video(tmp_path / "stripes.mp4", stripes, crf=2)
    with VideoReader(path) as reader:
        clip = read_clip(reader, [2], Geometry(24, 24, 0, 0, (24, 24)))
    assert np.abs(clip.astype(int)[..., 2:-2, 2:-2] - 127).max() < 12


@pytest.mark.parametrize("source", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "gray", "rgb24"])
def test_planes_are_what_swscale_makes_of_interleaved_pixels(source: str) -> None:
    picture = av.VideoFrame.from_ndarray(moving_square(1, 97, 129)[0], format="rgb24").reformat(format=source)
    for height, width in ((97, 129), (40, 50), (150, 200)):
        plain = picture.reformat(width, height, "rgb24", interpolation=RESIZE, threads=1).to_ndarray()
        assert np.array_equal(frame_to_rgb(picture, height, width), plain)
        assert np.array_equal(np.stack(frame_to_planes(picture, height, width)), plain.transpose(2, 0, 1))


def test_geometry() -> None:
    assert fit_geometry(720, 1280, (64, 64), 128, 0.0, 0.0) == Geometry(128, 228, 0, 0, (64, 64))
    assert fit_geometry(720, 1280, (64, 64), None) == Geometry(720, 1280, 328, 608, (64, 64))
    assert fit_geometry(48, 64, (64, 64), None) == Geometry(64, 85, 0, 11, (64, 64))  # enlarged until the crop fits
    assert fit_geometry(128, 228, (64, 64), 128, 0.999, 0.999)[2:4] == (64, 164)  # the last place is still inside
    assert fit_geometry(96, 64, (64, 64), 64, 0.0, 0.5)[:2] == (96, 64)


def test_crop_and_flip_are_exact(numbered: Path) -> None:
    with VideoReader(numbered) as reader:
        whole = read_clip(reader, [50], WHOLE)
        part = read_clip(reader, [50], Geometry(48, 64, 8, 24, (16, 32)), flip=True)
    assert np.array_equal(part, whole[:, :, 8:24, 24:56][..., ::-1])
    assert part.flags.c_contiguous


def test_a_turned_video_is_read_and_encoded_upright(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    frames = np.zeros((24, 48, 64, 3), dtype=np.uint8)
    frames[:, :24, :32] = 220  # top left
    plain, turned = write_video(tmp_path / "plain.mp4", frames, crf=4), tmp_path / "turned.mp4"
    command = [ffmpeg, "-v", "error", "-display_rotation", "90", "-i", str(plain), "-c", "copy", str(turned)]
    subprocess.run(command, check=True)
    info = probe_video(turned).info
    assert info is not None
    assert (info.height, info.width) == (64, 48)
    (result,) = encode_segments(turned, [Segment("a", 0, 0, 24)], EncodeOptions(None, 4, keep=False))
    for source in (turned, result.data):
        with VideoReader(source) as reader:
            image = read_clip(reader, [5], Geometry(64, 48, 0, 0, (64, 48)))[0, 0]
        # turned by 90 degrees against the clock: what was top left is bottom left
        assert image[48, 8] > 200
        assert image[8, 8] < 40
        assert image[48, 40] < 40


def test_what_is_not_a_video_or_damaged_says_so(tmp_path: Path, numbered: Path) -> None:
    data = numbered.read_bytes()
    for bad in (b"", b"not a video at all" * 100, data[:2000]):
        with pytest.raises(DataError, match="it "):
            VideoReader(bad)
    with VideoReader(data) as reader, pytest.raises(DataError, match="the video has 100"):
        next(reader.frames([100]))
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    assert probe_video(tmp_path / "cut.mp4").problem
    assert "No such file" in probe_video(tmp_path / "absent.mp4").problem


def test_odd_sides_become_even(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", moving_square(24, 70, 94))
    (result,) = encode_segments(path, [Segment("a", 0, 0, 24)], EncodeOptions(33, 20, keep=False))
    assert result.info is not None
    assert (result.info.height, result.info.width) == (32, 44)


def test_a_codec_without_a_decoder_is_said(tmp_path: Path) -> None:
    video = write_video(tmp_path / "unknown.mp4", moving_square(5)).read_bytes().replace(b"avc1", b"zzz9")
    with pytest.raises(DataError, match="no decoder"):
        VideoReader(video)


# The video stream that ffmpeg would choose.


SMALL = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=24:duration=1")


def sides(path: Path) -> tuple[int, int, int]:
    with VideoReader(path) as reader:
        info = reader.info()
    return info.frames, info.height, info.width


def test_an_attached_picture_is_never_the_video(tmp_path: Path) -> None:
    cover, path = tmp_path / "cover.png", tmp_path / "a.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=1280x720", "-frames:v", "1", cover)
    maps = ("-map", "1:v", "-map", "0:v", "-disposition:v:0", "attached_pic", "-disposition:v:1", "default")
    ffmpeg(*PATTERN, "-i", cover, *maps, "-c:v:0", "png", "-c:v:1", *H264[1:2], "-pix_fmt:v:1", "yuv420p", path)
    assert sides(path) == (60, 128, 192)


def test_a_file_of_cover_art_alone_says_so(tmp_path: Path) -> None:
    cover, path = tmp_path / "cover.png", tmp_path / "a.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=128x72", "-frames:v", "1", cover)
    sound = ("-f", "lavfi", "-i", "sine=duration=1")
    maps = ("-map", "0:a", "-map", "1:v", "-disposition:v:0", "attached_pic")
    ffmpeg(*sound, "-i", cover, *maps, "-c:v", "png", path)
    with pytest.raises(DataError, match=r"only 1 attached picture \(cover art\)"):
        VideoReader(path)


def test_an_animated_avif_is_a_video(tmp_path: Path) -> None:
    """Its first stream is a still picture of the same sides, which ffmpeg's command line takes."""
    path = tmp_path / "a.avif"
    ffmpeg(*PATTERN, "-frames:v", "8", "-c:v", "libaom-av1", "-cpu-used", "8", "-pix_fmt", "yuv420p", path)
    assert sides(path) == (8, 128, 192)
    with VideoReader(path) as reader:
        assert reader.rate == 24


@pytest.mark.parametrize(
    ("suffix", "order", "second", "options", "expected"),
    [
        ("mp4", "01", "default", (), (24, 48, 64)),
        ("mkv", "01", "default", (), (24, 48, 64)),
        ("mkv", "10", "0", ("-default_mode", "passthrough"), (60, 128, 192)),
    ],
)
def test_the_default_track_goes_first_and_the_largest_without_one(
    tmp_path: Path, suffix: str, order: str, second: str, options: tuple[str, ...], expected: tuple[int, int, int]
) -> None:
    path = tmp_path / f"a.{suffix}"
    tracks = [word for number in order for word in ("-map", f"{number}:v")]
    maps = (*tracks, "-disposition:v:0", "0", "-disposition:v:1", second)
    ffmpeg(*PATTERN, *SMALL, *maps, *H264, *options, path)
    assert sides(path) == expected
