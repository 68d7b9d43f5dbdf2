"""How far the parts of an embedder see: never further than `reach` says, and about as far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.models.decoder import conv_decoder_receptive_field, decoder_receptive_field, encoder_receptive_field
from regen_dist.models.embedder import Baseline, Regen, build_model
from regen_dist.models.encoder import Latents
from tests.helpers.tiny import clips, tiny_model, wake

SIDE = 24  # cells
AT = SIDE // 2
WINDOWED: dict[str, Any] = {"decoder__attention": {"pattern": "window", "window": [5, 2, 3]}, "decoder__blocks": 4}


def _changed_cells(before: Tensor, after: Tensor) -> Tensor:
    """Rows and columns of cells that differ, [n, 2], of pixels or latents [1, C, (T,) H, W]."""
    differs = (before != after).flatten(0, -3).any(0).float()
    scale = differs.shape[0] // SIDE
    return torch.nn.functional.max_pool2d(differs[None, None], scale)[0, 0].nonzero()


def _model(**changes: Any) -> Regen | Baseline:
    torch.manual_seed(0)
    model = build_model(tiny_model(**changes))
    wake(model)
    return model.eval()


def _spread(cells: Tensor) -> list[int]:
    return (cells - AT).abs().amax(0).tolist()


@torch.no_grad()
def test_an_encoder_sees_as_far_as_its_convolutions_reach() -> None:
    model = _model()
    video = clips(1, 5, 8 * SIDE, 8 * SIDE)
    other = video.clone()
    other[..., 8 * AT : 8 * AT + 8, 8 * AT : 8 * AT + 8] *= -1
    both = [torch.cat(model.encode(each), 1) for each in (video, other)]
    found, reach = _spread(_changed_cells(*both)), encoder_receptive_field(tiny_model().encoder)
    assert reach.step == (1, 1)
    assert all(limit - 1 <= far <= limit for far, limit in zip(found, reach.cells, strict=True))


@torch.no_grad()
def test_the_baselines_decoder_sees_as_far_as_its_convolutions_reach() -> None:
    model = _model(kind="magvit2")
    assert isinstance(model, Baseline)
    latents = torch.randn(2, 1, 8, SIDE, SIDE)
    other = latents.clone()
    other[..., AT, AT] *= -1
    found = _spread(_changed_cells(*(model.reconstruct(Latents(*each), 5) for each in (latents, other))))
    reach = conv_decoder_receptive_field(tiny_model().encoder)
    assert decoder_receptive_field(tiny_model(kind="magvit2")) == reach
    assert all(limit - 1 <= far <= limit for far, limit in zip(found, reach.cells, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("local", "cells"), [(False, (4, 7)), (True, (5, 8))])
def test_windows_see_no_further_than_their_reach(local: bool, cells: tuple[int, int]) -> None:
    """Two of the four blocks are shifted, with windows of 2 x 3 cells; a local convolution adds a cell each."""
    config = {**WINDOWED, "decoder__local": local}
    model = _model(**config)
    assert isinstance(model, Regen)
    reach = decoder_receptive_field(tiny_model(**config))
    assert reach == (cells, (2, 3))
    noisy = torch.randn(1, 3, 5, 8 * SIDE, 8 * SIDE)
    latents, times = Latents(*torch.randn(2, 1, 8, SIDE, SIDE)), torch.arange(5.0)[None]
    other = Latents(latents.content.clone(), latents.motion)
    other.content[..., AT, AT] *= -1
    found = _spread(_changed_cells(*(model.denoise(noisy, torch.ones(1), each, times) for each in (latents, other))))
    assert 2 < found[0] <= cells[0]
    assert 3 < found[1] <= cells[1]


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_full_attention_sees_everything(kind: str) -> None:
    assert (decoder_receptive_field(tiny_model(kind=kind)) is None) == (kind == "regen")
