"""Our frames are ffmpeg's: number, order, orientation and colour, over containers, codecs and what files do to readers;
in one pass, and by seeks to every keyframe and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from regen_dist.data.video.conversion import Geometry, frame_to_rgb
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.errors import DataError
from tests.helpers.video import H264, PATTERN, UInt8s, ffmpeg, field_pictures, shown_frames

# testsrc2 counts frames in large digits and moves everything: another frame differs by more than this.
TOLERANCE = 4.0  # mean difference of 8-bit values; versions of swscale differ in how they enlarge chroma

HEVC = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=error:pools=1:keyint=20")
VP9 = ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-deadline", "realtime", "-g", "20")
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2")
MPEG4 = ("-c:v", "mpeg4", "-q:v", "2", "-bf", "2")
GOP = (*H264, "-preset", "veryfast", "-g", "20")
NO_B = (*GOP, "-bf", "0")

MATRIX: dict[str, tuple[str, ...]] = {
    "mp4": ("h264", "h264-no-b", "hevc", "mpeg4", "vp9"),
    "mov": ("h264", "prores", "raw422"),
    "mkv": ("h264", "h264-no-b", "hevc", "mpeg2", "mpeg4", "vp9", "ffv1", "rawvideo"),
    "webm": ("vp9",),
    "avi": ("h264-no-b", "mpeg4", "ffv1", "rawvideo"),
    "mpg": ("mpeg2", "h264", "h264-no-b"),
    "vob": ("mpeg2",),
    "ts": ("h264", "h264-no-b", "hevc", "mpeg2"),
    "gif": ("gif",),
    "png": ("png",),
}
CODECS: dict[str, tuple[str, ...]] = {
    "h264": GOP,
    "h264-no-b": NO_B,
    "h264-index-first": (*GOP, "-movflags", "+faststart"),
    "hevc": HEVC,
    "mpeg2": MPEG2,
    "mpeg4": MPEG4,
    "vp9": VP9,
    "prores": ("-c:v", "prores_ks"),
    "ffv1": ("-c:v", "ffv1"),
    "rawvideo": ("-c:v", "rawvideo", "-pix_fmt", "yuv420p"),
    "raw422": ("-c:v", "rawvideo", "-pix_fmt", "uyvy422"),
    "gif": (),
    "png": ("-frames:v", "1"),
}
CASES = [(container, codec) for container, codecs in MATRIX.items() for codec in codecs]


def plain(folder: Path, container: str, codec: str) -> Path:
    path = folder / f"a.{container}"
    ffmpeg(*PATTERN, *CODECS[codec], *(("-f", "mpeg") if container == "mpg" else ()), path)
    return path


def sequentially(path: Path) -> UInt8s:
    with VideoReader(path) as reader:
        return np.stack([frame_to_rgb(frame) for _, frame in reader.frames(range(len(reader.table.pts)))])


def assert_as_ffmpeg(path: Path) -> None:
    """All frames in one pass, then those around every keyframe, each by a call of its own."""
    ours = sequentially(path)
    theirs = shown_frames(path, *ours.shape[1:3])
    assert len(ours) == len(theirs)
    differences = np.abs(ours.astype(np.int16) - theirs).mean((1, 2, 3))
    assert differences.max() < TOLERANCE, np.flatnonzero(differences >= TOLERANCE)
    for near in (1, -1):  # a frame is nearer to its own than to a neighbour: order, not only likeness
        others = np.abs(ours.astype(np.int16) - np.roll(theirs, near, 0)).mean((1, 2, 3))
        assert (others > differences).all() or len(ours) == 1
    with VideoReader(path) as reader:
        pts = reader.table.pts
        keys = [pts.index(shown) for shown, _ in reader.table.keyframes] or range(0, len(pts), 20)
        around = sorted(
            {near for key in keys for near in (key - 1, key, key + 1) if 0 <= near < len(pts)}, reverse=True
        )
        for number in around:
            ((_, frame),) = reader.frames([number])
            assert np.array_equal(frame_to_rgb(frame), ours[number]), number


@pytest.mark.parametrize(("container", "codec"), CASES)
def test_frames_are_ffmpegs(tmp_path: Path, container: str, codec: str) -> None:
    assert_as_ffmpeg(plain(tmp_path, container, codec))


ORIENTED: dict[str, tuple[str, ...]] = {
    "hflip": ("-display_hflip",),
    "vflip": ("-display_vflip",),
    "both flips": ("-display_hflip", "-display_vflip"),
    "90": ("-display_rotation", "90"),
    "180": ("-display_rotation", "180"),
    "270": ("-display_rotation", "270"),
    "89.9": ("-display_rotation", "89.9"),
    "179.5": ("-display_rotation", "179.5"),
    "90 mirrored": ("-display_rotation", "90", "-display_hflip"),
    "270 mirrored": ("-display_rotation", "270", "-display_vflip"),
}


@pytest.fixture(scope="module")
def upright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("upright"), "mkv", "h264")


@pytest.mark.parametrize(("how", "container"), [*((how, "mp4") for how in ORIENTED), ("90 mirrored", "mov")])
def test_orientation_is_ffmpegs(tmp_path: Path, upright: Path, container: str, how: str) -> None:
    path = tmp_path / f"turned.{container}"
    ffmpeg(*ORIENTED[how], "-i", upright, "-c", "copy", path)
    assert_as_ffmpeg(path)


def _copied(container: str, *options: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        base, path = plain(folder, "mp4", "h264"), folder / f"b.{container}"
        programs = ("-bsf:v", "h264_mp4toannexb", "-f", "mpeg") if container == "mpg" else ()
        ffmpeg(*options, "-i", base, "-c", "copy", *programs, path)
        return path

    return make


def _variable_rate(folder: Path) -> Path:
    path = folder / "b.mkv"
    ffmpeg(*PATTERN, "-vf", "select='not(mod(n,3))+gt(n,40)'", "-fps_mode", "passthrough", *GOP, path)
    return path


def _offset(folder: Path) -> Path:
    base, path = plain(folder, "mp4", "h264"), folder / "b.ts"
    ffmpeg("-itsoffset", "100", "-i", base, "-c", "copy", path)
    return path


def _damaged(folder: Path) -> Path:
    """One video packet in the middle of a transport stream overwritten."""
    path = plain(folder, "ts", "h264-no-b")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 188 * 188
    data[middle + 40 : middle + 184] = bytes(144)
    path.write_bytes(data)
    return path


def _no_times(folder: Path) -> Path:
    """An elementary stream: no timestamp anywhere."""
    path = folder / "b.h264"
    ffmpeg(*PATTERN, *GOP, "-f", "h264", path)
    return path


FEATURES: dict[str, Callable[[Path], Path]] = {
    "B-frames copied into avi": _copied("avi"),
    "B-frames copied into mpg": _copied("mpg"),
    "copied into ts": _copied("ts"),
    "edit list: starts inside a group of pictures": _copied("mov", "-ss", "0.4"),
    "variable rate": _variable_rate,
    "starts at 100 s": _offset,
    "a damaged packet in ts": _damaged,
    "no timestamps": _no_times,
}


@pytest.mark.parametrize("feature", FEATURES)
def test_what_files_do_to_readers(tmp_path: Path, feature: str) -> None:
    assert_as_ffmpeg(FEATURES[feature](tmp_path))


def test_a_rate_is_not_made_of_a_containers_ticks(tmp_path: Path) -> None:
    with VideoReader(_copied("avi")(tmp_path)) as reader:
        assert float(reader.rate) == 24


def test_lost_packets_are_counted(tmp_path: Path) -> None:
    path = plain(tmp_path, "ts", "mpeg2")
    data = bytearray(path.read_bytes())
    for start in range(len(data) // 2 // 188 * 188, len(data) * 3 // 4 // 188 * 188, 188):
        data[start + 4 : start + 188] = bytes(184)
    path.write_bytes(data)
    with VideoReader(path) as reader:
        assert 20 < len(reader.table.pts) < 60
        assert reader.table.lost > 0
        assert any(note.startswith("damaged: ") for note in reader.notes)
        assert [number for number, _ in reader.frames(range(len(reader.table.pts)))]


def test_a_gap_in_time_is_a_break(tmp_path: Path) -> None:
    """Half the frames an hour later."""
    path = tmp_path / "a.mkv"
    ffmpeg(*PATTERN, "-vf", "setpts=PTS+gte(N\\,30)*3600/TB", "-fps_mode", "passthrough", *GOP, path)
    assert_as_ffmpeg(path)
    with VideoReader(path) as reader:
        assert list(reader.breaks()) == [30]
        assert "3600" in reader.breaks()[30]
        assert reader.rate == 24


def test_a_change_of_size_is_a_break(tmp_path: Path) -> None:
    parts = [tmp_path / "1.ts", tmp_path / "2.ts"]
    for part, size in zip(parts, ("192x128", "128x192"), strict=True):
        ffmpeg("-f", "lavfi", "-i", f"testsrc2=size={size}:rate=24:duration=1", *NO_B, part)
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with VideoReader(path) as reader:
        sides = [(frame.height, frame.width) for _, frame in reader.frames(range(48))]
        assert list(reader.breaks()) == [24]
    assert sides == [(128, 192)] * 24 + [(192, 128)] * 24


@pytest.mark.parametrize("codec", ["h264", "mpeg2"])
def test_a_change_of_the_pixels_shape_is_a_break(tmp_path: Path, codec: str) -> None:
    """Each frame is made square by its own shape, however it was reached; B-frames of the first part come out late."""
    parts = [tmp_path / "1.ts", tmp_path / "2.ts"]
    for part, aspect in zip(parts, ("1", "221/150"), strict=True):
        source = ("-f", "lavfi", "-i", "testsrc2=size=192x128:rate=24:duration=1", "-vf", f"setsar={aspect}")
        ffmpeg(*source, *CODECS[codec], part)
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with VideoReader(path) as reader:
        sides = [(frame.height, frame.width) for _, frame in reader.frames(range(48))]
        assert reader.breaks() == {24: "the shape of pixels changes at frame 24"}
        ((_, late),) = reader.frames([40])
        ((_, early),) = reader.frames([3])
    assert sides == [(128, 192)] * 24 + [(128, 283)] * 24
    assert (late.width, early.width) == (283, 192)


CUT = [("mp4", "h264-index-first"), ("mkv", "h264"), ("mkv", "ffv1"), ("webm", "vp9"), ("avi", "ffv1")]


@pytest.mark.parametrize(("container", "codec"), CUT)
def test_a_file_that_is_cut_off_is_read_and_noted(tmp_path: Path, container: str, codec: str) -> None:
    """Up to the last whole packet: the reader of Matroska ends there silently, that of mp4 returns part of one."""
    path = plain(tmp_path, container, codec)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 5 // 8])
    for source in (path, path.read_bytes()):
        with VideoReader(source) as reader:
            frames = list(reader.frames(range(len(reader.table.pts))))
            assert "damaged: the file is cut off before its end" in reader.notes
        assert 20 < len(frames) < 50
    assert_as_ffmpeg(path)
    path.write_bytes(data)
    with VideoReader(path) as reader:
        assert not any("damaged" in note for note in reader.notes)


# Files that other programs show and that were refused, cut short or played too fast.


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_matroska_file_that_begins_inside_an_open_group_of_pictures(tmp_path: Path, codec: str) -> None:
    """Cut as mkvmerge and recorders do: the pictures in front of the first keyframe lean on what was cut away."""
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    keys = "open-gop=1:keyint=20:min-keyint=20:bframes=3:scenecut=0"
    extra = ("-x264-params", keys) if codec == "libx264" else ("-x265-params", f"{keys}:log-level=error:pools=1")
    ffmpeg(*PATTERN, "-c:v", codec, "-pix_fmt", "yuv420p", "-threads", "1", *extra, whole)
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream, seen = source.streams.video[0], 0
        copied = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            seen += packet.is_keyframe
            if packet.pts is not None and seen > 1:
                packet.stream = copied
                target.mux(packet)
    assert_as_ffmpeg(cut)


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_fields_that_have_a_packet_each(tmp_path: Path, container: str) -> None:
    """AVCHD of a camera, remuxed: two packets a frame, of which the second has a time but no frame."""
    path, levels = tmp_path / f"a.{container}", range(40, 220, 6)
    (tmp_path / "a.h264").write_bytes(field_pictures(levels))
    ffmpeg("-fflags", "+genpts", "-i", tmp_path / "a.h264", "-c", "copy", path)
    with VideoReader(path) as reader:
        assert (len(reader.table.pts), reader.rate) == (len(levels), 25)
        for numbers in (range(len(levels)), [7], [3, 21]):
            found = [int(frame.to_ndarray()[:16].mean().round()) for _, frame in reader.frames(numbers)]
            assert found == [levels[number] for number in numbers]


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_fields_that_have_a_packet_each_after_whole_frames(tmp_path: Path, container: str) -> None:
    """A camera may choose picture by picture. The 25 frames at the beginning have one packet each."""
    path, levels, whole = tmp_path / f"a.{container}", range(40, 220, 6), tmp_path / "whole.h264"
    x264 = ("-c:v", "libx264", "-x264-params", "interlaced=1:bframes=0", "-pix_fmt", "yuv420p", "-threads", "1")
    ffmpeg("-f", "lavfi", "-i", "color=gray:size=16x32:rate=25:duration=1", *x264, whole)
    (tmp_path / "a.h264").write_bytes(whole.read_bytes() + field_pictures(levels))
    ffmpeg("-fflags", "+genpts", "-i", tmp_path / "a.h264", "-c", "copy", path)
    with VideoReader(path) as reader:
        assert (len(reader.table.pts), reader.rate) == (25 + len(levels), 25)
        found = [int(frame.to_ndarray()[:16].mean().round()) for _, frame in reader.frames(range(25, 55))]
        assert found == list(levels)


def test_repeated_pictures_of_theora_have_no_end_in_them(tmp_path: Path) -> None:
    """A packet without bytes says that the picture stays; it was taken for the end of the file."""
    path = tmp_path / "a.ogv"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=24:duration=1.7", "-c:v", "libtheora", path)
    with VideoReader(path) as reader:
        count = len(reader.table.pts)
    assert count == len(shown_frames(path, 48, 64)) > 20
    assert len(sequentially(path)) == count


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4", "ffv1"])
def test_frames_that_an_avi_leaves_out_take_their_time(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.avi"
    skipping = ("-vf", r"select='not(eq(mod(n\,5)\,2))'", "-fps_mode", "passthrough", "-enc_time_base", "1:24")
    ffmpeg(*PATTERN, *skipping, "-c:v", codec, *(("-bf", "0") if codec == "mpeg4" else ()), path)
    with VideoReader(path) as reader:
        times = [float((pts - reader.table.pts[0]) * reader.stream.time_base) for pts in reader.table.pts]
    shown = [number for number in range(60) if number % 5 != 2]
    assert times == pytest.approx([number / 24 for number in shown], abs=1e-3)


def test_damage_in_the_first_group_of_pictures_loses_that_alone(tmp_path: Path) -> None:
    path = plain(tmp_path, "mp4", "h264-index-first")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 700
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(data)
    with VideoReader(path) as reader:
        info = reader.info()
        assert (info.height, info.width) == (128, 192)
        with pytest.raises(DataError, match="damaged"):
            list(reader.frames([0]))
        assert len(list(reader.frames(range(20, 60)))) == 40


@pytest.mark.parametrize("matrix", [8, 12, 15, 16, 17])
def test_colours_that_cannot_be_converted_are_an_error_that_names_them(
    tmp_path: Path, upright: Path, matrix: int
) -> None:
    path = tmp_path / "matrix.mp4"
    tags = f"h264_metadata=matrix_coefficients={matrix}:colour_primaries=1:transfer_characteristics=1"
    ffmpeg("-i", upright, "-c", "copy", "-bsf:v", tags, path)
    with VideoReader(path) as reader, pytest.raises(DataError, match=rf"matrix {matrix} of H\.273"):
        read_clip(reader, range(3), Geometry(128, 192, 0, 0, (128, 192)))
