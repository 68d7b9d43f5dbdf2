"""How close decoded stretches are to their sources: PSNR, SSIM, VMAF, and a distance between features of both."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regen_dist.errors import DataError
from regen_dist.evaluation.compression.features import NAME, segment_features, why_unavailable
from regen_dist.evaluation.compression.frechet import frechet_distance
from regen_dist.evaluation.metrics import SSIM_WINDOW, Meter, Vmaf, psnr_db, squared_error, vmaf
from regen_dist.inference.frames import Frame, write_video

_RATE = 25  # of the copies that VMAF reads; it plays no part


class Decoded(NamedTuple):
    """A stretch and what was made of it, uint8 [T, H, W, 3] each."""

    source: Frame
    made: Frame


def quality(stretches: Sequence[Decoded], features: Tensor | None = None) -> dict[str, Any]:
    """The measures of stretches of one size. Where one cannot be had it is None, and `notes` says why.

    `psnr_db` is the mean over stretches of each one's PSNR, which is of its mean squared error; `psnr_pooled_db` that
    of the error over all of them; SSIM the mean over frames; VMAF that of all stretches one after the other.

    Args:
        stretches: of one size.
        features: of the sources, where `features_of` has made them already.

    Raises:
        DataError: there is none.
    """
    if not stretches:
        raise DataError("there is no decoded stretch to measure")
    meters = [_metered(each) for each in stretches]
    errors = [error for meter in meters for error in meter.errors]
    similarities = [value for meter in meters for value in meter.similarities]
    score, (distance, why) = _vmaf(stretches), _distance(stretches, features)
    notes = [f"VMAF: {score.reason}"] if score.score is None else []
    if not similarities:
        notes.append(f"SSIM: its window of {SSIM_WINDOW} pixels does not fit {stretches[0].source.shape[1:3]}")
    return {
        "psnr_db": fmean(meter.psnr_db for meter in meters),
        "psnr_pooled_db": psnr_db(fmean(errors)),
        "psnr_of_stretches_db": [meter.psnr_db for meter in meters],
        "ssim": fmean(similarities) if similarities else None,
        "vmaf": score.score,
        "frechet": distance,
        "frames": len(errors),
        "notes": [*notes, *([f"{NAME}: {why}"] if why else [])],
    }


def mean_psnr_db(stretches: Iterable[Decoded]) -> float:
    """As `psnr_db` of `quality`, alone."""
    return fmean(psnr_db(squared_error(*each)) for each in stretches)


def _metered(stretch: Decoded) -> Meter:
    meter = Meter()
    for source, made in zip(stretch.source, stretch.made, strict=True):
        meter.add(source, made)
    return meter


def _vmaf(stretches: Sequence[Decoded]) -> Vmaf:
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / f"{name}.mp4" for name in Decoded._fields]
        for number, path in enumerate(copies):
            write_video(path, (frame for stretch in stretches for frame in stretch[number]), _RATE, crf=0)
        return vmaf(*copies)


def features_of(videos: Iterable[Frame]) -> Tensor | None:
    """Features [N, D] of all segments of videos; None where there is no network for them."""
    return None if why_unavailable() else torch.cat([segment_features(each) for each in videos])


def _distance(stretches: Sequence[Decoded], features: Tensor | None) -> tuple[float | None, str]:
    """The distance, or None and why."""
    source = features_of(each.source for each in stretches) if features is None else features
    made = features_of(each.made for each in stretches)
    if source is None or made is None:
        return None, why_unavailable()
    try:
        return frechet_distance(source, made), ""
    except DataError as error:
        return None, str(error)
