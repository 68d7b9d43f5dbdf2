"""Data configs that several suites read with."""

from __future__ import annotations

from pathlib import Path

from regen_dist.config.datasets import DataConfig, ReadConfig
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions

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
