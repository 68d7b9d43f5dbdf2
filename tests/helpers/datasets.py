"""Small datasets: built, drawn and made by others, with the data configs and loaders that read them."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import webdataset

from regen_dist.config.datasets import DataConfig, ReadConfig
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.loading.clip_loader import ClipBatch, clip_batches
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import Attributes, SyntheticOptions, describe_scene, draw_frames
from tests.helpers.video import UInt8s, moving_square, write_video

OPTIONS = BuildOptions(segment_seconds=1.5, short_side=48, crf=20, samples_per_shard=4, min_frames=20)
PARTS = replace(OPTIONS, part_gb=1e-6, samples_per_shard=2)  # every source is a part
FLAGS = ["--segment-seconds", "1.5", "--short-side", "48", "--crf", "20", "--min-frames", "20"]
FLAGS += ["--part-gb", "1e-6", "--samples-per-shard", "2"]


def write_sources(folder: Path) -> Path:
    """Three videos, one in a folder of its own: 10 segments of 36 frames and one of 24, with OPTIONS."""
    write_video(folder / "wide.mp4", moving_square(180, 64, 96, seed=1))
    write_video(folder / "tall.mp4", moving_square(108, 96, 64, seed=2))
    write_video(folder / "more" / "short one.mkv", moving_square(96, 64, 64, seed=3))
    return folder


def render_scene(number: int, options: SyntheticOptions) -> tuple[UInt8s, Attributes]:
    """Clip `number` without encoding: uint8 RGB [frames, side, side, 3], and its attributes."""
    scene, _ = describe_scene(number, options)
    return draw_frames(scene), scene.attributes


def start_build(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command, running; its output is kept."""
    command = [sys.executable, "-m", "tools.cli", "shards", "build", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_builds(*commands: Sequence[str | Path]) -> list[str]:
    """Run commands side by side to their end; their output. Fails when one does."""
    processes = [start_build(*arguments) for arguments in commands]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def wait_for(store: Store, name: str, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until an object is there; fails when the process has ended by then."""
    deadline = time.monotonic() + seconds
    while store.size(name) is None:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{name} did not come"
        time.sleep(0.02)


def objects(url: str | Path) -> dict[str, bytes]:
    """Everything at a URL."""
    store = Store(url)
    return {name: store.get(name) for name in store.list()}


# Data configs that several suites read with.


SIZES = ((32, 48), (48, 32), (32, 32))


def single(dataset: Path) -> DataConfig:
    """One dataset, one crop, two strides; a quarter of the batches are images."""
    return DataConfig(
        url=str(dataset), size=(32, 40), short_side=48, stride=(1, 2), image_fraction=0.25, workers=0,
        read=ReadConfig(ahead_mb=1),
    )  # fmt: skip


def draw_shapes(folder: Path) -> Path:
    """Six squares of twelve frames."""
    build_synthetic(folder, SyntheticOptions(6, seed=1, side=48, frames=12), workers=0)
    return folder


def mixed_with(dataset: Path, shapes: Path) -> DataConfig:
    """Real videos of three aspects (wide, tall, square) and shapes, two to one; a quarter of the batches are images."""
    sources = [{"url": str(dataset), "weight": 2}, {"url": str(shapes), "weight": 1}]
    values = {"mixture": sources, "buckets": SIZES, "short_side": "fit", "stride": [1, 2], "image_fraction": 0.25}
    return DataConfig.model_validate(values | {"workers": 0, "read": {"ahead_mb": 1}})


# WebDataset tars as others write them, with real videos.


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


def flip_byte(path: Path, position: int) -> None:
    """Turn over one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


# Decoding workers of loaders in tests.


def forget_environment() -> None:
    """End the process that workers are forked from: it has the environment of the first test that had workers."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def start(config: DataConfig, **changes: Any) -> Generator[ClipBatch]:
    """A loader: batches of 8 clips of 9 frames, one rank, from the beginning; `changes` are of these."""
    of_set: dict[str, Any] = {"num_frames": 9, "batch_global": 8, "seed": 3}
    of_rank: dict[str, Any] = {"accumulation": 1, "rank": 0, "world_size": 1, "cursor": 0}
    data = TrainingSet(config, **{name: changes.get(name, value) for name, value in of_set.items()})
    return clip_batches(data, **{name: changes.get(name, value) for name, value in of_rank.items()})


def read(config: DataConfig, number: int, **changes: Any) -> list[ClipBatch]:
    """Its first batches."""
    iterator = start(config, **changes)
    try:
        return list(islice(iterator, number))
    finally:
        iterator.close()


def worker_ids(iterator: Any) -> list[int]:
    """The process ids of a started loader's workers."""
    return [int(worker.pid) for worker in iterator.gi_frame.f_locals["batches"]._workers]
