"""`regen reconstruct`: a video through a codec into a folder with videos, a contact sheet and the measures,
beside trivial decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from regen_dist.config.files import write_text_atomically
from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.metrics import Measurement, Options, Pair, Roundtrip, measure
from regen_dist.evaluation.reconstruction_table import RECONSTRUCTION_MEASURES
from regen_dist.evaluation.sheet import sheet_frames, write_sheet
from regen_dist.inference.codec import Window, blended, window_weights
from regen_dist.inference.frames import Frame, SourceVideo, VideoWriter, check_written_sides
from regen_dist.inference.long_video import VideoCodec
from regen_dist.jsontext import json_text
from regen_dist.models.encoder import Latents
from regen_dist.observe.hardware import describe_machine, memory_bytes

FILES = ("reconstruction.mp4", "side_by_side.mp4", "contact_sheet.png", "metrics.json")
RECONSTRUCTION, SIDE_BY_SIDE, SHEET, METRICS = FILES
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
        source, codec: the video, and the codec that encodes and decodes it.
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
    if source.path.resolve() in ((out / name).resolve() for name in (RECONSTRUCTION, SIDE_BY_SIDE)):
        raise DataError(f"{source.path} would be replaced by its reconstruction; choose another --out")
    _make_folder(out, source)
    cuts = source.cuts() if options.cuts else ()
    with ExitStack() as stack:
        rate = source.rate if options.fps is None else options.fps
        alone = stack.enter_context(VideoWriter(out / RECONSTRUCTION, rate))
        both = stack.enter_context(VideoWriter(out / SIDE_BY_SIDE, rate))

        def on_output(pair: Pair) -> None:
            seconds = pair.seconds if options.fps is None else None
            alone.write(pair.decoded, seconds)
            both.write(_side_by_side(pair.source, pair.decoded), seconds)

        measurement = measure(Roundtrip(source, codec, options, on_output, cuts), on_pair=on_pair)
        (out / METRICS).unlink(missing_ok=True)  # of an earlier run: it must not describe the new videos
    title = f"{source.path.name}   {measurement.psnr_db:.2f} dB, {measurement.latent_bits_per_pixel:.3f} bits per pixel"
    write_sheet(out / SHEET, columns.numbers, columns.source, {label: columns.decoded}, title=title)
    trivial = {"trivial": measure_trivial(source, codec.num_frames, options, cuts)} if compare else {}
    report = _report(source, cuts, options, label, model, measurement) | trivial
    write_text_atomically(out / METRICS, json_text(report, indent=2) + "\n")
    return report


def measure_trivial(
    source: SourceVideo, num_frames: int, options: Options, cuts: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Measure the trivial decoders on the same video, cut into the same clips, at the source's own times."""
    plain = replace(options, fps=None, steps=1)
    found: dict[str, dict[str, Any]] = {}
    for kind in TRIVIAL_KINDS:
        measurement = measure(Roundtrip(source, TrivialCodec(kind, num_frames), plain, cuts=cuts))
        figures = {each.key: getattr(measurement, each.key) for each in RECONSTRUCTION_MEASURES}
        found[kind] = {"label": LABELS[kind], **figures}
    return found


def _report(
    source: SourceVideo,
    cuts: Sequence[int],
    options: Options,
    label: str,
    model: Mapping[str, Any],
    measurement: Measurement,
) -> dict[str, Any]:
    video = {
        "file": source.path.name,
        "frames": source.num_frames,
        "height": source.height,
        "width": source.width,
        "fps": float(source.rate),
        "stored_height": source.stored[0],
        "stored_width": source.stored[1],
        "cuts": list(cuts),
        "notes": list(source.notes),
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


def _side_by_side(left: Frame, right: Frame) -> Frame:
    divider = np.full((left.shape[0], _DIVIDER, 3), 255, np.uint8)
    return np.concatenate([left, divider, right], axis=1)


def _make_folder(folder: Path, source: SourceVideo) -> None:
    check_written_sides(folder / SIDE_BY_SIDE, source.height, 2 * source.width + _DIVIDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error}; choose another --out") from error


# Decoders that a trained one must beat.
#
# They take whole frames, far more data than two latents, and their clips are cut, streamed and blended like the
# codec's.


TrivialKind = Literal["repeat_first", "blend", "mean"]
TRIVIAL_KINDS: tuple[TrivialKind, ...] = get_args(TrivialKind)
LABELS: dict[TrivialKind, str] = {
    "repeat_first": "Repeat the first frame",
    "blend": "Blend first and last frame",
    "mean": "Mean of the clip",
}


class TrivialCodec:
    """Codec that keeps one or two frames of a clip: `repeat_first`, `blend` (first to last, linear in time) or `mean`.

    It has the interface of `regen_dist.inference.long_video.VideoCodec`. Its "latents" are pixels [B, 3, H, W].
    """

    def __init__(self, kind: TrivialKind, num_frames: int) -> None:
        if kind not in TRIVIAL_KINDS:
            raise ConfigError(f"no trivial decoder is called {kind!r}; there are {', '.join(TRIVIAL_KINDS)}")
        self.kind: str = kind
        self.num_frames = num_frames

    def encode(self, clips: Tensor) -> Latents:
        """Encode clips [B, 3, T, H, W] as two frames [B, 3, H, W] each."""
        first = clips.mean(dim=2) if self.kind == "mean" else clips[:, :, 0]
        last = clips[:, :, -1] if self.kind == "blend" else first
        return Latents(first, last)

    def decode_windows(
        self, windows: list[Window], times: Tensor, *, steps: int = 1, seed: int = 0, sample_id: int = 0
    ) -> Tensor:
        """Decode frames [1, 3, F, H, W] at `times` [F], blending overlapping windows. Steps and noise are ignored."""

        def decode(window: Window, seen: Tensor) -> Tensor:
            along = ((times[seen] - window.start) / max(window.length - 1, 1)).float().clamp(0, 1)
            first, last = (frame[:, :, None] for frame in window.latents)
            return torch.lerp(first, last, along[:, None, None])

        return blended(windows, window_weights(windows, times).float(), decode)
