"""WebDataset tars as others write them, with real videos."""

from __future__ import annotations

import json
import tarfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import webdataset

from tests.helpers.video import moving_square, write_video


@lru_cache(maxsize=64)
def clip(frames: int = 8, height: int = 32, width: int = 48, seed: int = 0, fps: int = 24) -> bytes:
    """The bytes of a small H.264 file."""
    with TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "clip.mp4", moving_square(frames, height, width, seed), fps=fps)
        return path.read_bytes()


def write_tar(path: Path, samples: list[dict[str, Any]], **options: Any) -> Path:
    """A tar by webdataset's own writer: texts and JSON are encoded by it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), **options) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def numbered(count: int, *, start: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Samples with a video, a caption and a description; videos differ by `seed` and number."""
    return [
        {
            "__key__": f"{start + number:06d}",
            "mp4": clip(6 + number % 3, seed=seed + number),
            "txt": f"caption {number} of {seed}",
            "json": {"url": "https://example.org/secret", "duration": 1.5},
        }
        for number in range(count)
    ]


def write_shards(folder: Path, shards: int = 3, samples: int = 4) -> list[Path]:
    """Some whole tars, whose keys go on from one to the next."""
    return [
        write_tar(folder / f"{shard:05d}.tar", numbered(samples, start=shard * samples, seed=shard * samples))
        for shard in range(shards)
    ]


def members(path: Path) -> dict[str, bytes]:
    """All regular members of a tar by tarfile, which reads what we must read."""
    with tarfile.open(path) as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar if member.isreg()]
        return {name: file.read() for name, file in files if file is not None}


def add_member(tar: tarfile.TarFile, name: str, data: bytes | Any) -> None:
    """Append a member; what is not bytes is written as JSON."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))


def change(path: Path, position: int) -> None:
    """Turn over one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)
