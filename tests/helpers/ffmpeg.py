"""Files made, and frames read, by imageio-ffmpeg's binary: the measure that our own reading is held to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

UInt8s = npt.NDArray[np.uint8]
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
