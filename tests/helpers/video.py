"""Small real videos made from numpy or by ffmpeg, and frames as ffmpeg shows them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

UInt8s = npt.NDArray[np.uint8]


def moving_square(num_frames: int, height: int = 64, width: int = 96, seed: int = 0) -> UInt8s:
    """A bright square that crosses a gradient: [T, H, W, 3]. Another seed gives other colours and another direction."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    background = (rows * 100 // height + columns * 100 // width)[..., None] * random.uniform(0.3, 1.0, 3)
    frames = np.repeat(background[None], num_frames, axis=0)
    side, colour, speed = height // 4, random.uniform(120, 255, 3), random.uniform(0.5, 2.0, 2)
    for index in range(num_frames):
        top, left = (int(speed[0] * index) % (height - side), int(speed[1] * index) % (width - side))
        frames[index, top : top + side, left : left + side] = colour
    return frames.astype(np.uint8)


def numbered_frames(num_frames: int, height: int = 48, width: int = 64) -> UInt8s:
    """Frames that tell their number (below 256) in eight upright bars, dark for 0 and bright for 1."""
    bits = (np.arange(num_frames)[:, None] >> np.arange(8)) & 1
    bars = np.repeat(60 + 140 * bits, width // 8, axis=1)
    frames = np.broadcast_to(bars[:, None, :, None], (num_frames, height, width, 3))
    return np.ascontiguousarray(frames, dtype=np.uint8)


def frame_numbers(clip: UInt8s) -> list[int]:
    """The numbers that `numbered_frames` wrote, from a clip [3, T, H, W] of the whole width."""
    bars = clip.mean((0, 2)).reshape(clip.shape[1], 8, -1).mean(-1)
    return [int(number) for number in (bars > 130) @ (1 << np.arange(8))]


def write_video(
    path: Path,
    frames: UInt8s,
    *,
    fps: int = 24,
    crf: int = 18,
    keyframe_interval: int = 24,
    ticks: list[int] | None = None,
    x264: str = "",
    codec: str = "libx264",
) -> Path:
    """Encode [T, H, W, 3] with B-frames. `ticks` gives each frame's time in 1/1000 s, for a variable frame rate;
    `x264` more of x264's own options ("open-gop=1:tff=1"); another `codec` gets `keyframe_interval` only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        params = f"keyint={keyframe_interval}:bframes=3:threads=1" + f":{x264}" * bool(x264)
        options = {"crf": str(crf), "preset": "fast", "x264-params": params}
        if codec != "libx264":
            options = {"g": str(keyframe_interval)} | ({"cpu-used": "5"} if codec == "libvpx-vp9" else {})
        stream = container.add_stream(codec, rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000) if ticks else Fraction(1, fps)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = ticks[index] if ticks else index
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# Files made, and frames read, by imageio-ffmpeg's binary: the measure that our own reading is held to.

PATTERN = ("-f", "lavfi", "-i", "testsrc2=size=192x128:rate=24:duration=2.5")
H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-threads", "1")


def ffmpeg(*arguments: str | Path) -> bytes:
    """Run ffmpeg; what it wrote to stdout."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def shown_frames(path: Path, height: int, width: int, filters: str = "null") -> UInt8s:
    """All frames as ffmpeg shows them after `filters`: RGB [T, height, width, 3]."""
    flags = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    resize = f"{filters},scale={width}:{height}:{flags}"
    raw = ffmpeg("-i", path, "-vf", resize, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


# H.264 whose frames are two field pictures (PAFF), as cameras write AVCHD, and as no encoder of ffmpeg does.


_PICTURES_OF_16X32 = f"{0x4D001E:024b}110110100110010100001{1:032b}{50:032b}10000"  # Main; 50 fields a second


def field_pictures(levels: Sequence[int]) -> bytes:
    """An elementary stream of 25 frames a second, each of one grey, 32 rows of 16: raw macroblocks (I_PCM)."""
    stream = _nal(7, 3, _PICTURES_OF_16X32) + _nal(8, 3, "1100111000111100")
    for number, bottom in product(range(len(levels)), (0, 1)):
        first = number == bottom == 0
        head = f"{_ue(0)}{_ue(7)}{_ue(0)}{number % 16:04b}1{bottom}{_ue(0) + '00' if first else '0'}"
        head += _ue(0) + _ue(1) + _ue(25)  # quantiser, no deblocking, the kind of macroblock
        head += "0" * (-len(head) % 8) + f"{levels[number]:08b}" * 256 + f"{128:08b}" * 128
        stream += _nal(9, 0, "000") + _nal(5 if first else 1, 2, head)
    return stream


def _ue(value: int) -> str:
    return f"{value + 1:0{2 * (value + 1).bit_length() - 1}b}"


def _nal(kind: int, reference: int, bits: str) -> bytes:
    bits += "1" + "0" * (-(len(bits) + 1) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8)
    return b"\0\0\0\1" + bytes([reference << 5 | kind]) + re.sub(rb"\0\0([\0-\3])", b"\0\0\3\\1", data)
