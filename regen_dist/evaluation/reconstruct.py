"""`regen reconstruct`: a video through a codec into a folder with videos, a contact sheet and the measures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regen_dist.errors import DataError
from regen_dist.evaluation.baselines import LABELS, TRIVIAL_KINDS, TrivialCodec
from regen_dist.evaluation.metrics import Measurement, Options, Pair, Passage, measure
from regen_dist.evaluation.sheet import sheet_frames, write_sheet
from regen_dist.inference.frames import Frame, SourceVideo, VideoWriter
from regen_dist.inference.long_video import VideoCodec
from regen_dist.jsontext import json_text
from regen_dist.observe.hardware import describe_machine, memory_bytes

RECONSTRUCTION, SIDE_BY_SIDE, SHEET, METRICS = (
    "reconstruction.mp4",
    "side_by_side.mp4",
    "contact_sheet.png",
    "metrics.json",
)
_DIVIDER = 4  # pixels between the two halves of the side-by-side video


@dataclass
class _Columns:
    """Collector of the frames that the contact sheet shows."""

    numbers: list[int]
    source: list[Frame] = field(default_factory=list)
    decoded: list[Frame] = field(default_factory=list)

    def add(self, pair: Pair) -> None:
        if pair.index in self.numbers:
            self.source.append(pair.source)
            self.decoded.append(pair.decoded)


def reconstruct(
    source: SourceVideo,
    codec: VideoCodec,
    out: Path,
    options: Options,
    *,
    label: str,
    model: Mapping[str, Any],
    compare: bool = False,
    progress: Callable[[int], None] = lambda frame: None,
) -> dict[str, Any]:
    """Encode a video, decode it from the latents alone, and write the result into `out`.

    Every file appears complete or not at all; `metrics.json` comes last. Files of an earlier run are replaced.

    Args:
        source: the video.
        codec: the codec that encodes and decodes.
        out: folder, created if needed.
        options: steps, rate, overlap and seed.
        label: name of the decoder in pictures.
        model: facts about the model, for the record.
        compare: also measure the trivial decoders on the same clips.
        progress: called with the number of frames that are done.

    Returns:
        The content of `metrics.json`.

    Raises:
        ConfigError: the options do not fit.
        DataError: the video is damaged, or `out` cannot be written.
    """
    columns = _Columns(sheet_frames(source.num_frames))

    def on_pair(pair: Pair) -> None:
        columns.add(pair)
        progress(pair.index + 1)

    options.check(codec)
    _make_folder(out)
    with ExitStack() as stack:
        rate = source.rate if options.fps is None else options.fps
        alone = stack.enter_context(VideoWriter(out / RECONSTRUCTION, rate))
        both = stack.enter_context(VideoWriter(out / SIDE_BY_SIDE, rate))

        def on_output(pair: Pair) -> None:
            seconds = pair.seconds if options.fps is None else None
            alone.write(pair.decoded, seconds)
            both.write(_beside(pair.source, pair.decoded), seconds)

        measurement = measure(Passage(source, codec, options, on_output), on_pair=on_pair)
    title = f"{source.path.name}   {measurement.psnr_db:.2f} dB, {measurement.latent_bits_per_pixel:.3f} bits per pixel"
    write_sheet(out / SHEET, columns.numbers, columns.source, {label: columns.decoded}, title=title)
    report = _report(source, options, label, model, measurement)
    if compare:
        report["trivial"] = measure_trivial(source, codec.num_frames, options)
    write_json(out / METRICS, report)
    return report


def measure_trivial(source: SourceVideo, num_frames: int, options: Options) -> dict[str, dict[str, Any]]:
    """Measure the trivial decoders on the same video, cut into the same clips, at the source's own times."""
    plain = replace(options, fps=None, steps=1)
    found: dict[str, dict[str, Any]] = {}
    for kind in TRIVIAL_KINDS:
        measurement = measure(Passage(source, TrivialCodec(kind, num_frames), plain))
        kept = ("psnr_db", "psnr_mean_over_frames_db", "ssim", "vmaf")
        found[kind] = {"label": LABELS[kind], **{name: getattr(measurement, name) for name in kept}}
    return found


def _report(
    source: SourceVideo, options: Options, label: str, model: Mapping[str, Any], measurement: Measurement
) -> dict[str, Any]:
    video = {
        "file": source.path.name,
        "frames": source.num_frames,
        "height": source.height,
        "width": source.width,
        "fps": float(source.rate),
        "stored_height": source.stored[0],
        "stored_width": source.stored[1],
    }
    return {
        "label": label,
        "video": video,
        "model": dict(model),
        "options": asdict(options),
        **asdict(measurement),
        "peak_memory_bytes": memory_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "machine": describe_machine(),
    }


def _beside(left: Frame, right: Frame) -> Frame:
    divider = np.full((left.shape[0], _DIVIDER, 3), 255, np.uint8)
    return np.concatenate([left, divider, right], axis=1)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error}; choose another --out") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, then move it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json_text(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
