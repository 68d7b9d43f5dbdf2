"""The trivial decoders do what their names say."""

from __future__ import annotations

import pytest
import torch

from regen_dist.errors import ConfigError
from regen_dist.evaluation.reconstruct import LABELS, TRIVIAL_KINDS, TrivialCodec
from regen_dist.inference.codec import Window


def decode(kind: str, clip: torch.Tensor) -> list[float]:
    codec = TrivialCodec(kind, clip.shape[2])  # type: ignore[arg-type]
    window = Window(codec.encode(clip), 0.0, clip.shape[2])
    return codec.decode_windows([window], torch.arange(clip.shape[2]))[0, 0, :, 0, 0].tolist()


def test_each_kind() -> None:
    clip = torch.tensor([0.0, 1.0, 0.0, 0.5, 0.4]).view(1, 1, 5, 1, 1).expand(1, 3, 5, 8, 8)
    assert decode("repeat_first", clip) == [0.0] * 5
    assert decode("blend", clip) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert decode("mean", clip) == pytest.approx([0.38] * 5)
    assert set(LABELS) == set(TRIVIAL_KINDS)


def test_an_image_is_kept() -> None:
    for kind in TRIVIAL_KINDS:
        assert decode(kind, torch.full((1, 3, 1, 8, 8), 0.25)) == [0.25]


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="repeat_first, blend, mean"):
        TrivialCodec("nearest", 9)  # type: ignore[arg-type]
