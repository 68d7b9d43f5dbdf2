"""`regen evaluate`: every model on every video of a protocol, then means with confidence intervals over the videos.

The measures of one video and one model are kept in a file, under a key of everything that decides them. Running the
same command again measures what is missing.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from regen_dist.config.files import write_bytes_atomically, write_text_atomically
from regen_dist.errors import DataError
from regen_dist.evaluation.evaluated_models import EvaluatedModel
from regen_dist.evaluation.metrics import (
    Options,
    Pair,
    Roundtrip,
    VideoMeter,
    has_ffmpeg,
    measure,
    psnr_db,
    squared_error,
)
from regen_dist.evaluation.perceptual import (
    MS_SSIM_SIDE,
    GivenNetwork,
    flicker,
    frechet_distance,
    grid_energy,
    ms_ssim,
    segments,
)
from regen_dist.evaluation.protocol import PinnedVideo, Protocol
from regen_dist.evaluation.reconstruction_table import Measure
from regen_dist.inference.frames import Frame, VideoWriter, write_video
from regen_dist.jsontext import json_text
from regen_dist.observe.hardware import describe_machine, forget_peak, process_memory_bytes
from regen_dist.pixels import to_float
from regen_dist.shared_files import short_name
from regen_dist.tables import counted

MEDIA, MEASURED = "media", "measured"
WORST_FRAMES = 3  # worst frames kept of each video and model, from different stretches of `_STRETCH` frames
_STRETCH = 8
RESAMPLES, CONFIDENCE = 10_000, 0.95


MEASURES = (
    Measure("psnr_db", "PSNR, dB", 2, 1),
    Measure("ssim", "SSIM", 4, 1),
    Measure("ms_ssim", "MS-SSIM", 4, 1),
    Measure("vmaf", "VMAF", 1, 1),
    Measure("lpips", "LPIPS", 4, -1),
    Measure("rfvd", "rFVD", 1, -1),
    Measure("rfid", "rFID", 2, -1),
    Measure("flicker", "Temporal flicker, 8-bit units", 3, -1),
    Measure("seam_ratio", "Seam ratio over the source's", 3),
    Measure("grid_energy", "Grid energy", 3, -1),
    Measure("bits_per_pixel", "Bits per pixel", 4),
    Measure("encode_ms_per_frame", "Encoding, ms a frame", 2),
    Measure("decode_ms_per_frame", "Decoding, ms a frame", 2),
)
_FRECHET = {"rfvd": "segments", "rfid": "frames"}


@dataclass(frozen=True)
class Networks:
    """Networks that the user gave weights for."""

    lpips: GivenNetwork | None = None
    fvd: GivenNetwork | None = None
    fid: GivenNetwork | None = None

    def names(self) -> dict[str, str | None]:
        """File and hash of each network, by measure; None where it was not given."""
        given = {"lpips": self.lpips, "rfvd": self.fvd, "rfid": self.fid}
        return {key: network.name if network else None for key, network in given.items()}


@dataclass
class _FrameMeasures:
    """Collector of one video's measures of pairs of frames, apart from PSNR and SSIM."""

    period: int
    networks: Networks
    segment_frames: int
    ms_ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    flicker: list[float] = field(default_factory=list)
    grid: list[float] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    worst: dict[int, tuple[float, Pair]] = field(default_factory=dict)  # worst pair of each stretch
    _last: Pair | None = None
    _pending: list[Pair] = field(default_factory=list)  # pairs of the segment that is not full yet

    def add(self, pair: Pair) -> None:
        similarity, grid = ms_ssim(pair.source, pair.decoded), grid_energy(pair.source, pair.decoded, self.period)
        self.ms_ssim += [] if similarity is None else [similarity]
        self.grid += [] if grid is None else [grid]
        if self._last is not None:
            frames = (self._last.source, pair.source), (self._last.decoded, pair.decoded)
            self.flicker.append(flicker(*frames))
        self._last = pair
        self._remember_worst(pair)
        if self.networks != Networks():
            self._pending.append(pair)
            if len(self._pending) == self.segment_frames:
                self.finish(whole=True)

    def finish(self, *, whole: bool = False) -> None:
        """Pass the pending frames through the networks; an incomplete segment gives no video features."""
        pending, self._pending = self._pending, []
        sides = {side: [getattr(pair, side) for pair in pending] for side in ("source", "decoded")} if pending else {}
        for side, frames in sides.items():
            if self.networks.fvd is not None and whole:
                self._keep(f"segments_{side}", self.networks.fvd.call(segments(frames, self.segment_frames)))
            if self.networks.fid is not None:
                self._keep(f"frames_{side}", self.networks.fid.call(_batch(frames)))
        if self.networks.lpips is not None and pending:
            a, b = (to_float(_batch(sides[side])) for side in ("source", "decoded"))
            self.lpips += self.networks.lpips.call(a, b).tolist()

    def _keep(self, name: str, features: Tensor) -> None:
        self.features.setdefault(name, []).append(features.cpu())

    def _remember_worst(self, pair: Pair) -> None:
        error = squared_error(pair.source, pair.decoded)
        stretch = pair.index // _STRETCH
        if stretch not in self.worst or error > self.worst[stretch][0]:
            self.worst[stretch] = (error, pair)
        if len(self.worst) > WORST_FRAMES:
            del self.worst[min(self.worst, key=lambda each: self.worst[each][0])]


def _batch(frames: Sequence[Frame]) -> Tensor:
    """Stack frames as float [N, 3, H, W] in [0, 255]."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()


def measure_video(
    video: PinnedVideo,
    model: EvaluatedModel,
    protocol: Protocol,
    networks: Networks,
    out: Path,
    *,
    with_vmaf: bool = True,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure one video with one model; write the decoded video and the worst frames for the page.

    Args:
        video: the frames.
        model: the model that encodes and decodes.
        protocol: steps, overlap and seed, cell size.
        networks: the networks that the user gave.
        out: folder of the evaluation.
        with_vmaf: true to measure VMAF, which needs an ffmpeg with libvmaf.

    Returns:
        The video's part of the JSON, and the features of its segments and frames.
    """
    options = Options(steps=model.steps, overlap=min(protocol.overlap, model.codec.num_frames - 1), seed=protocol.seed)
    roundtrip, meter = Roundtrip(video, model.codec, options), VideoMeter()
    frames = _FrameMeasures(protocol.period, networks, protocol.segment_frames)
    folder = out / MEDIA / model.name
    folder.mkdir(parents=True, exist_ok=True)
    before = reset_peak_memory()
    with ExitStack() as stack:
        shown = stack.enter_context(VideoWriter(folder / f"{video.name}.mp4", video.rate, crf=18, preset="fast"))

        def on_pair(pair: Pair) -> None:
            frames.add(pair)
            shown.write(pair.decoded)

        found = measure(roundtrip, with_vmaf=with_vmaf, on_pair=on_pair, meter=meter)
    frames.finish()
    speed, pixels = roundtrip.speed, video.num_frames * video.height * video.width
    seam = found.seam_ratio / found.seam_ratio_source if found.seam_ratio and found.seam_ratio_source else None
    values = {
        "psnr_db": found.psnr_db, "ssim": found.ssim, "ms_ssim": _mean(frames.ms_ssim), "vmaf": found.vmaf,
        "lpips": _mean(frames.lpips), "flicker": _mean(frames.flicker), "seam_ratio": seam,
        "grid_energy": _mean(frames.grid),
        "bits_per_pixel": model.bits(speed.latent_values, roundtrip.plan.clip) / pixels,
        "encode_ms_per_frame": 1000 * speed.encode_s / video.num_frames,
        "decode_ms_per_frame": 1000 * speed.decode_s / video.num_frames,
    }  # fmt: skip
    curves = {
        "psnr_db": [psnr_db(error) for error in meter.errors], "ssim": meter.similarities, "ms_ssim": frames.ms_ssim,
        "lpips": frames.lpips, "flicker": [0.0, *frames.flicker],
    }  # fmt: skip
    notes = [note for note in found.notes if not note.startswith("seam")]
    if not frames.ms_ssim:
        notes.append(f"MS-SSIM: its five scales take {MS_SSIM_SIDE} pixels a side, found {video.height}x{video.width}")
    worst = _write_worst(frames, folder, video.name)
    facts = {"values": values, "curves": {key: each for key, each in curves.items() if each}, "worst": worst}
    facts |= {"working_memory_bytes": max(0, peak_memory() - before), "notes": notes}
    return facts, {name: torch.cat(parts) for name, parts in frames.features.items()}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _write_worst(frames: _FrameMeasures, folder: Path, name: str) -> list[dict[str, Any]]:
    """Write source and reconstruction of the worst frames, worst first."""
    from PIL import Image

    found = []
    for error, pair in sorted(frames.worst.values(), key=lambda each: -each[0]):
        files = {}
        for side in ("source", "decoded"):
            path = folder / f"{short_name(name)}_{pair.index}_{side}.png"
            Image.fromarray(np.ascontiguousarray(getattr(pair, side))).save(path)
            files[side] = f"{MEDIA}/{quote(folder.name)}/{quote(path.name)}"
        found.append({"frame": pair.index, "psnr_db": psnr_db(error), **files})
    return found


def reset_peak_memory() -> int:
    """Start a new peak and return the bytes in use: in the GPU's allocator, or resident in this process (Linux)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):  # not allowed: `peak_memory` is then that of the whole process so far
        forget_peak()
    return process_memory_bytes("VmRSS")


def peak_memory() -> int:
    """Bytes at the peak since `reset_peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return process_memory_bytes("VmHWM")


# Evaluation of all models on all videos.


@dataclass
class Evaluation:
    """An evaluation in a folder.

    Args:
        out: folder of the measures, the videos, the JSON and the page.
        protocol: protocol of the evaluation.
        videos: videos that the protocol selects.
        networks: the networks that the user gave.
        log: prints a line of progress.
        with_vmaf: true to measure VMAF.
    """

    out: Path
    protocol: Protocol
    videos: Sequence[PinnedVideo]
    networks: Networks
    log: Callable[[str], None] = lambda line: None
    with_vmaf: bool = True

    def run(self, models: Sequence[Callable[[], EvaluatedModel]]) -> dict[str, Any]:
        """Measure everything that is missing, one model after the other, and return the content of the JSON."""
        if not models or not self.videos:
            raise DataError("an evaluation takes at least one model and one video")
        network = self.networks.fvd
        if network is not None and network.segment_frames not in (None, self.protocol.segment_frames):
            raise DataError(
                f"{network.name} takes {network.segment_frames} frames, and the protocol's segments have "
                f"{self.protocol.segment_frames}; give --segment-frames {network.segment_frames}"
            )
        (self.out / MEDIA / "source").mkdir(parents=True, exist_ok=True)
        sources = [self._source(video) for video in self.videos]
        facts: dict[str, Any] = {
            "protocol": self.protocol.facts(), "protocol_hash": self.protocol.hash,
            "source_hash": hashlib.sha256("".join(each["sha256"] for each in sources).encode()).hexdigest()[:16],
            "weights": self.networks.names(), "machine": describe_machine(), "videos": sources,
        }  # fmt: skip
        facts["models"] = [self._model(load(), sources) for load in models]
        return facts

    def _source(self, video: PinnedVideo) -> dict[str, Any]:
        digest, shown = video.sha256(), self.out / MEDIA / "source" / f"{video.name}.mp4"
        mark, marked = shown.with_name(f"{short_name(video.name)}.sha256"), f"{digest} {video.rate}"
        if not shown.is_file() or not mark.is_file() or mark.read_text(encoding="ascii") != marked:
            write_video(shown, video.frames(), video.rate)
            write_text_atomically(mark, marked)
        size = {"frames": video.num_frames, "height": video.height, "width": video.width, "fps": float(video.rate)}
        return {"name": video.name, **size, "sha256": digest, "notes": list(video.notes)}

    def _model(self, model: EvaluatedModel, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found, features = [], []
        for video, source in zip(self.videos, sources, strict=True):
            facts, own = self._kept(model, video, str(source["sha256"]))
            found.append({"video": video.name, **facts})
            features.append(own)
        encoding, decoding = model.flops(self.videos[0].height, self.videos[0].width) or (None, None)
        clip = model.codec.num_frames
        costs = {
            "parameters": model.parameters, "clip_frames": clip,
            "encode_flops_per_frame": None if encoding is None else encoding / clip,
            "decode_flops_per_frame": None if decoding is None else decoding / clip,
            "working_memory_bytes": max(each["working_memory_bytes"] for each in found),
        }  # fmt: skip
        return {
            "name": model.name, "label": model.label, "steps": model.steps, "fingerprint": model.fingerprint,
            "costs": costs, "summary": summarise(found, features), "videos": found,
        }  # fmt: skip

    def _kept(self, model: EvaluatedModel, video: PinnedVideo, digest: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Measures of one video, read from their file where it has the same key."""
        decided_by = [self.protocol.hash, digest, model.fingerprint, model.codec.num_frames, model.steps]
        decided_by += [self.networks.names(), self.with_vmaf and has_ffmpeg()]  # measured again once it is installed
        decided_by += [str(video.rate), describe_machine()["device"]]  # times of another machine would be shown as ours
        key = hashlib.sha256(json_text(decided_by).encode()).hexdigest()
        path = self.out / MEASURED / model.name / f"{short_name(video.name)}.json"
        arrays = path.with_suffix(".npz")
        shown = self.out / MEDIA / model.name / f"{video.name}.mp4"
        if all(each.is_file() for each in (path, arrays, shown)):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                with np.load(arrays, allow_pickle=False) as file:
                    return kept["facts"], {name: torch.from_numpy(file[name]) for name in file.files}
        self.log(f"{model.name}: {video.name}, {counted(video.num_frames, 'frame')} of {video.height}x{video.width}")
        path.unlink(missing_ok=True)  # first, so that it never describes other files
        facts, features = measure_video(video, model, self.protocol, self.networks, self.out, with_vmaf=self.with_vmaf)
        data = io.BytesIO()
        np.savez_compressed(data, **{name: each.numpy() for name, each in features.items()})  # type: ignore[arg-type]
        write_bytes_atomically(arrays, data.getvalue())
        write_text_atomically(path, json_text({"key": key, "facts": facts}, indent=1) + "\n")
        return facts, features


def summarise(found: Sequence[Mapping[str, Any]], features: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Summarise each measure over the videos: `mean`, `low` and `high` of its 95% interval (None for fewer than two
    videos), and the number of videos (of features, for a Fréchet distance) behind it."""
    summary: dict[str, Any] = {}
    for each in MEASURES:
        if each.key in _FRECHET:
            summary[each.key] = _frechet_summary(_FRECHET[each.key], features)
            continue
        values = [video["values"][each.key] for video in found if video["values"][each.key] is not None]
        low, high = bootstrap_interval(values)
        summary[each.key] = {"mean": _mean(values), "low": low, "high": high, "count": len(values)}
    return summary


def bootstrap_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of the mean over videos, the same in every run; (None, None) for fewer than two."""
    if len(values) < 2:
        return None, None
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(data[drawn].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _frechet_summary(kind: str, features: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Distance over the features of all videos, with a jackknife interval over videos: resampling with replacement
    would repeat features, which changes the distance itself."""
    pairs = [(each[f"{kind}_source"], each[f"{kind}_decoded"]) for each in features if f"{kind}_source" in each]
    count = sum(len(source) for source, _ in pairs)
    if count < 2:
        return {"mean": None, "low": None, "high": None, "count": count}
    distance, half = _distance(pairs), None
    if len(pairs) >= 3 and all(count - len(source) >= 2 for source, _ in pairs):
        left_out = np.array([_distance(pairs[:i] + pairs[i + 1 :]) for i in range(len(pairs))])
        number = len(pairs)
        half = 1.96 * float(np.sqrt((number - 1) / number * np.sum((left_out - left_out.mean()) ** 2)))
    interval = (None, None) if half is None else (max(0.0, distance - half), distance + half)
    return {"mean": distance, "low": interval[0], "high": interval[1], "count": count}


def _distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    return frechet_distance(torch.cat([source for source, _ in pairs]), torch.cat([made for _, made in pairs]))


def why_missing(facts: Mapping[str, Any]) -> list[str]:
    """Explain the measures that are missing from the table, one line each."""
    options = {"lpips": "--lpips", "rfvd": "--fvd", "rfid": "--fid"}
    titles = {each.key: each.title for each in MEASURES}
    lines = [
        f"{titles[key]}: not measured, for no weights were given ({options[key]} FILE; docs/evaluate.md names some)"
        for key, name in facts["weights"].items()
        if name is None
    ]
    notes = {note for model in facts["models"] for video in model["videos"] for note in video["notes"]}
    for key, kind in _FRECHET.items():
        if facts["weights"][key] and any(model["summary"][key]["mean"] is None for model in facts["models"]):
            lines.append(f"{titles[key]}: the videos have fewer than two {kind}")
    return lines + sorted(notes)
