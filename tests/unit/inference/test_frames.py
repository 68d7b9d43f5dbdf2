"""Videos are read upright and in time, and written whole or not at all."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from regen_dist.errors import DataError
from regen_dist.inference.frames import Frame, SourceVideo, VideoWriter
from tests.helpers.video import H264, ffmpeg


def gradient(num_frames: int, height: int, width: int) -> list[Frame]:
    """Colours that change over space and time, smooth so that 4:2:0 keeps them."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 40 + 170 * y / height, 220 - 180 * x / width
    return [np.stack([red, green, np.full_like(red, 30 + 8 * t)], -1).astype(np.uint8) for t in range(num_frames)]


def write(path: Path, frames: list[Frame], rate: Fraction | float = 25, seconds: list[float] | None = None) -> Path:
    with VideoWriter(path, rate, crf=4, preset="ultrafast") as writer:
        for index, frame in enumerate(frames):
            writer.write(frame, None if seconds is None else seconds[index])
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    frames = gradient(6, 48, 64)
    source = SourceVideo(write(tmp_path / "a.mp4", frames, Fraction(30000, 1001)))
    read = list(source.frames())
    assert (source.num_frames, source.height, source.width) == (6, 48, 64)
    assert source.rate == Fraction(30000, 1001)
    np.testing.assert_allclose(source.timestamps, np.arange(6) * 1001 / 30000, atol=1e-9)
    assert np.abs(np.stack(read).astype(int) - np.stack(frames)).mean() < 2  # colours survive the YUV matrices
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]


@pytest.mark.parametrize("rate", [0.5, 12.5, 23.976, 59.94, 120])
def test_any_rate(tmp_path: Path, rate: float) -> None:
    source = SourceVideo(write(tmp_path / "a.mp4", gradient(3, 16, 16), rate))
    assert float(source.rate) == pytest.approx(rate, rel=1e-4)


def test_the_rate_of_rounded_times_is_the_containers(tmp_path: Path) -> None:
    """Matroska rounds times to milliseconds: by them 24 frames of 24000/1001 a second have 23.983."""
    path = tmp_path / "a.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=32x32:rate=24000/1001:duration=1", *H264, path)
    assert SourceVideo(path).rate == SourceVideo(path, max_frames=5).rate == Fraction(24000, 1001)


def test_variable_rate(tmp_path: Path) -> None:
    seconds = [0.0, 0.1, 0.15, 0.5]
    source = SourceVideo(write(tmp_path / "a.mp4", gradient(4, 16, 16), 10, seconds))
    np.testing.assert_allclose(source.timestamps, seconds, atol=1e-4)


def test_frames_that_are_microseconds_apart(tmp_path: Path) -> None:
    """Recorders of screens count in microseconds, and may give two frames at almost the same time."""
    seconds = [0.0, 0.033333, 0.033336, 0.033337, 0.066666]
    source = SourceVideo(write(tmp_path / "a.mp4", gradient(5, 16, 16), 10, seconds))
    np.testing.assert_allclose(source.timestamps, seconds, atol=1e-4)
    assert len(list(source.frames())) == 5


def test_slides_that_stay_for_hours_have_a_rate(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        for number, frame in enumerate(gradient(3, 16, 16)):
            writer.write(frame, 7200.0 * number)
    assert SourceVideo(tmp_path / "a.mp4").rate == Fraction(1, 1001)


def test_odd_sides_are_padded_by_the_edge(tmp_path: Path) -> None:
    frames = gradient(2, 31, 45)
    source = SourceVideo(write(tmp_path / "a.mp4", frames))
    assert (source.height, source.width) == (32, 46)
    first = next(source.frames()).astype(int)
    assert np.abs(first[:31, :45] - frames[0]).mean() < 3
    assert np.abs(first[31] - first[30]).max() < 8


def test_short_side_and_max_frames(tmp_path: Path) -> None:
    source = SourceVideo(write(tmp_path / "a.mp4", gradient(5, 48, 96)), short_side=24, max_frames=3)
    frames = list(source.frames())
    assert len(frames) == source.num_frames == 3
    assert frames[0].shape == (24, 48, 3)
    assert source.stored == (48, 96)
    assert len(list(source.frames())) == 3  # a second time


def test_rotation_is_honoured(tmp_path: Path) -> None:
    frames = gradient(2, 32, 64)
    path = write(tmp_path / "a.mp4", frames)
    turned = tmp_path / "turned.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", str(path), "-c", "copy"]
    subprocess.run([*command, str(turned)], check=True)
    source = SourceVideo(turned)
    assert source.stored == (64, 32)
    assert np.abs(next(source.frames()).astype(int) - np.rot90(frames[0])).mean() < 3


def test_unreadable(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound_frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound_frame.sample_rate = 8000
        container.mux(stream.encode(sound_frame))
    for path in (tmp_path / "missing.mp4", tmp_path, text, empty, sound):
        with pytest.raises(DataError, match=path.name):
            SourceVideo(path)
    with pytest.raises(DataError, match=r"empty\.mp4 is empty \(0 bytes\)"):
        SourceVideo(empty)


def test_a_pipe_is_no_missing_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="it is a pipe or a device"):
        SourceVideo(tmp_path / "a.mp4")


def test_cut_file(tmp_path: Path) -> None:
    """Frames that are there are read and noted where the index comes first; without an index nothing can be read."""
    path = write(tmp_path / "a.mp4", gradient(30, 64, 64))
    path.write_bytes(path.read_bytes()[:-200])
    cut = SourceVideo(path)
    assert 20 < len(list(cut.frames())) == cut.num_frames < 30
    assert "damaged: the file is cut off before its end" in cut.notes
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"a\.mp4"):
        SourceVideo(path)


def test_colours_stay_where_they_are(tmp_path: Path) -> None:
    """H.264 without a chroma location means the left edge of two pixels, swscale writes their middle: 30.9 dB."""
    waves = np.sin(np.arange(96) * 2 * np.pi / 12)
    row = np.stack([128 + 90 * waves, 128 - 45 * waves, np.full(96, 128)], -1)
    frame = np.broadcast_to(row.round(), (64, 96, 3)).astype(np.uint8)
    read = next(iter(SourceVideo(write(tmp_path / "a.mp4", [frame])).frames()))
    assert np.square(read[:, 8:-8].astype(float) - frame[:, 8:-8]).mean() < 30


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the encoder finds in memory that was used before, at sides that are no multiples of 16."""
    code = (
        "import sys, numpy as np; from pathlib import Path; from regen_dist.inference.frames import write_video\n"
        "noise = np.random.default_rng(0).integers(0, 256, (23, 10, 12, 3), dtype=np.uint8)\n"
        "write_video(Path(sys.argv[1]), noise.repeat(5, 1).repeat(6, 2)[:, :, :66], 24)\n"
    )
    written = []
    for fill in ("40", "80", "120"):
        path = tmp_path / f"{fill}.mp4"
        environment = os.environ | {"MALLOC_PERTURB_": fill}
        subprocess.run(
            [sys.executable, "-c", code, str(path)], check=True, env=environment, cwd=Path(__file__).parents[3]
        )
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("options", [{"short_side": 0}, {"max_frames": 0}])
def test_refuses_counts_below_one(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="at least 1"):
        SourceVideo(tmp_path / "a.mp4", **options)


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"

    def fail() -> None:
        with VideoWriter(path, 25) as writer:
            writer.write(gradient(1, 16, 16)[0])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    with pytest.raises(DataError, match="no frames"), VideoWriter(path, 25):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_when_writing_fails(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", gradient(2, 16, 16))
    before = path.read_bytes()
    with pytest.raises(DataError), VideoWriter(path, 25):
        pass
    assert path.read_bytes() == before


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """And nothing that a writer on another machine may be at, whose process is not known here."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    old, new = (tmp_path / f".{name}.mp4.{gone.pid}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    write(tmp_path / "a.mp4", gradient(1, 16, 16))
    assert set(tmp_path.iterdir()) == {new, tmp_path / "a.mp4"}


def test_a_full_disk_is_one_error_with_its_remedy(tmp_path: Path) -> None:
    """Also where the file cannot be ended either; a limit of the file size stands for the disk."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(DataError) as caught:
            write(tmp_path / "a.mp4", list(noise))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = str(caught.value)
    assert found == f"{tmp_path}/a.mp4 cannot be written: File too large; choose another --out, or make room"
    assert list(tmp_path.iterdir()) == []


def test_an_animated_webp_is_named(tmp_path: Path) -> None:
    """FFmpeg opens it as one packet and decodes none."""
    frames = [Image.fromarray(frame) for frame in gradient(3, 16, 16)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"none of 1 packets can be decoded as webp; .*convert it"):
        SourceVideo(tmp_path / "a.webp")


def test_writer_names_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*cannot be written"), VideoWriter(tmp_path / "nowhere" / "a.mp4", 25):
        pass
    for rate in (0, 0.0004):
        with pytest.raises(DataError, match="at least 1 frame in 1001 s"):
            VideoWriter(tmp_path / "a.mp4", rate)
