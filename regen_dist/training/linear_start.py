"""Fit of an embedder's linear code before its first step, to cells of the first clips of the data order: principal
components of the cells instead of cosines.

Ours. The content latent takes the principal components of the first frame's cell, the motion latent those of what
the later frames hold beyond what the content predicts of them, and the decoder's map is the least-squares one back, so
that training begins where a linear code of these data ends (docs/embedder.md has the measurement).

Legend: B clips, M cells, k temporal compression, P = 8 pixels a side of a cell, C latent channels, J time modes.
"""

from __future__ import annotations

from contextlib import closing
from itertools import count

import torch
from torch import Tensor

from regen_dist.config.run import SPATIAL_COMPRESSION as P
from regen_dist.data.loading.clip_loader import clip_batches
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.errors import DataError
from regen_dist.models.embedder import Baseline, Regen
from regen_dist.models.encoder import Encoder
from regen_dist.models.layers import fold_patches, split_first
from regen_dist.models.linear import EvenLinear, LinearDecoder
from regen_dist.pixels import to_float

LINEAR_CODES = ("encoder.linear.", "linear.", "decoder.linear.")  # modules that it sets, of REGEN and of the baseline

_RMS = 0.3  # std of the latents over channels: well inside their ball
_SPREAD = 0.5  # of a component's std how much stays in its channel's: all channels bear latent noise about as well
_RIDGE = 1e-6  # share of the mean square of a feature
_OVERSAMPLING, _POWER_ITERATIONS = 8, 4  # of the randomised decomposition (Halko, Martinsson and Tropp, 2011)


def frames_to_cells(video: Tensor) -> Tensor:
    """Clips [B, 3, k+1, H, W] in [-1, 1] to the pixels of their cells, [B*h*w, k+1, 3*P*P]."""
    first, rest = fold_patches(split_first(video.float()), P)
    frames = first.unsqueeze(2) if rest is None else torch.cat([first.unsqueeze(2), rest], 2)  # [B, 192, k+1, h, w]
    return frames.permute(0, 3, 4, 2, 1).flatten(0, 2)


@torch.no_grad()
def fit_linear_code(model: Regen | Baseline, cells: Tensor) -> None:
    """Set the linear code of a fresh embedder to that of these cells [M, k+1, 3*P*P].

    In float64, so that ranks that round apart (by where in memory their tensors lie) still find the same components.

    Raises:
        DataError: fewer cells than the code has numbers.
    """
    decoder = model.linear if isinstance(model, Regen) else model.decoder.linear
    channels = model.config.latent.channels
    if len(cells) < 4 * channels * (1 + model.config.temporal_compression):
        raise DataError(
            f"{len(cells)} cells of clips are too few to fit a linear code of {channels} channels; give more videos, "
            "or set model.linear_start=dct"
        )
    content, motion = _fit_encoder(cells, channels)
    assert isinstance(model.encoder, Encoder), "a frozen encoder has no linear code"
    linear = model.encoder.linear
    for layer, (weight, bias) in ((linear.content, content), (linear.motion, motion)):
        _set(layer, weight, bias)
    if decoder is not None:
        _fit_decoder(decoder, cells, *(_apply(part, cells) for part in (content, motion)))


Map = tuple[Tensor, Tensor]  # weight [C, inputs] and bias [C]


def _fit_encoder(cells: Tensor, channels: int) -> tuple[Map, Map]:
    """The maps of the first frame's cell and of the whole cell, as `LinearEncoder` has them."""
    first, later = cells[:, 0].double(), cells[:, 1:].flatten(1).double()
    mean, centre = first.mean(0), later.mean(0)
    basis = _components(first - mean, channels)  # [C, 192]
    content_values = (first - mean) @ basis.T  # [M, C]
    motion_from_content = torch.linalg.lstsq(content_values, later - centre).solution  # [C, k*192]
    residual = later - centre - content_values @ motion_from_content
    moving = _components(residual, channels)  # [C, k*192]
    content = _scaled(basis, -basis @ mean, content_values)
    weight = torch.cat([-moving @ motion_from_content.T @ basis, moving], 1)  # [C, (k+1)*192]
    motion = _scaled(weight, -weight @ torch.cat([mean, centre]), residual @ moving.T)
    return content, motion


def _components(x: Tensor, count: int) -> Tensor:
    """The leading principal components of centred rows, [count, inputs]; the largest number of each is positive."""
    *_, right = torch.svd_lowrank(x, q=min(count + _OVERSAMPLING, *x.shape), niter=_POWER_ITERATIONS)
    basis = right[:, :count].T
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return basis * largest.sign()


def _scaled(weight: Tensor, bias: Tensor, values: Tensor) -> Map:
    """The map whose outputs have the spread that latents should have; `values` [M, C] are what it makes so far."""
    std = values.std(0).clamp(min=1e-4)
    gain = std ** (_SPREAD - 1)
    gain = gain * _RMS / (std * gain).square().mean().sqrt()
    return weight * gain[:, None], bias * gain


def _apply(of: Map, cells: Tensor) -> Tensor:
    """Latents [M, C] before they are bounded."""
    weight, bias = of
    return (cells.flatten(1)[:, : weight.shape[1]].double() @ weight.T + bias).float()


def _set(layer: EvenLinear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight / layer.scale)
    layer.bias.copy_(bias)


def _fit_decoder(decoder: LinearDecoder, cells: Tensor, content: Tensor, motion: Tensor) -> None:
    """Least squares from what the decoder sees of the latents to the pixels of every frame."""
    times = torch.arange(cells.shape[1], dtype=torch.float32)[None]
    features = decoder.features(content[:, None, None, None], motion[:, None, None, None], times).squeeze(2).squeeze(2)
    features = torch.cat([features, torch.ones_like(features[..., :1])], -1).flatten(0, 1).double()  # [M*(k+1), F+1]
    gram = features.T @ features
    gram += torch.eye(len(gram), dtype=gram.dtype) * _RIDGE * gram.diagonal().mean()
    solved = torch.linalg.solve(gram, features.T @ cells.flatten(0, 1).double())  # [F+1, 192]
    decoder.weight.copy_(solved[:-1].T)
    decoder.bias.copy_(solved[-1])


MOST_CELLS, CELLS_PER_CLIP, MOST_CLIPS = 8192, 128, 512  # few of each clip, so that many clips are seen


def first_cells(data: TrainingSet) -> Tensor:
    """Cells of the first clips of the order, [M, k+1, 3*P*P] in [-1, 1]; images are passed over.

    Clips are read one by one: this process alone would need the memory of all ranks for a global batch.

    Raises:
        DataError: a sample and all its possible replacement samples are bad, or the store does not answer.
    """
    taken, cells, clips, size = list[Tensor](), 0, 0, data.order.batch_global
    with closing(clip_batches(data, accumulation=size, rank=0, world_size=1, cursor=_first_clips(data))) as batches:
        for batch in batches:
            clips += 1
            if batch.video.shape[2] > 1:
                taken.append(_some_cells(batch.video))
                cells += len(taken[-1])
            if cells >= MOST_CELLS or clips >= MOST_CLIPS:
                break
    return torch.cat(taken) if taken else torch.empty(0)


def _first_clips(data: TrainingSet) -> int:
    """Return the cursor of the first global batch that is not of images; 0 where all are."""
    if all(bucket.is_image for bucket in data.buckets):
        return 0
    batches = (data.order.micro_batch(step, 0, data.order.batch_global, 0, 1) for step in count())
    return next(batch.step for batch in batches if not batch.bucket.is_image) * data.order.batch_global


def _some_cells(video: Tensor) -> Tensor:
    """Take evenly spread cells of each of the uint8 clips [B, 3, k+1, H, W]."""
    cells = frames_to_cells(to_float(video))
    every = max(1, len(cells) // (len(video) * CELLS_PER_CLIP))
    return cells[::every].clone()  # a view would keep all of them
