"""Rotary positions: relative, without a table, exact in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regen_dist.models.attention import rotary_angles, rotate, split_pairs

GRID = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(5), indexing="ij"), -1).flatten(0, 2)


def _scores(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    by = rotary_angles(positions, q.shape[-1])
    return torch.einsum("blne,bmne->bnlm", rotate(q, by), rotate(k, by))


def _q_and_k(width: int = 16) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(2, 1, len(GRID), 2, width, generator=torch.Generator().manual_seed(0)).unbind(0)
    return q, k


@pytest.mark.parametrize("shift", [(7, 0, 0), (0, 30, 0), (0, 0, 100), (5, 40, 64)])
def test_only_differences_of_positions_matter(shift: tuple[int, int, int]) -> None:
    """All tokens moved by the same clips, rows and columns: the same attention scores."""
    q, k = _q_and_k()
    torch.testing.assert_close(_scores(q, k, GRID + torch.tensor(shift)), _scores(q, k, GRID), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_matters(axis: int) -> None:
    """One token moved along one axis alone: the scores of its pairs with others change."""
    q, k = _q_and_k(6)  # the narrowest head: one pair for each axis
    moved = GRID.clone()
    moved[0, axis] += 1
    changed = (_scores(q, k, moved) - _scores(q, k, GRID)).abs()
    assert changed[..., 0, 1:].min() > 1e-4
    assert changed[..., 1:, 1:].max() == 0


def test_lengths_stay_and_the_origin_is_not_turned() -> None:
    q, _ = _q_and_k()
    turned = rotate(q, rotary_angles(GRID, 16))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], q[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("width", "pairs"), [(6, (1, 1, 1)), (8, (1, 2, 1)), (10, (1, 2, 2)), (32, (5, 6, 5)), (128, (21, 22, 21))]
)
def test_the_clip_has_the_fewest_pairs(width: int, pairs: tuple[int, int, int]) -> None:
    assert split_pairs(width) == pairs
    assert sum(pairs) == width // 2


def test_far_positions_stay_apart_in_bf16() -> None:
    """Angles are float32: columns 300 and 301, which are one number in bf16, are turned differently."""
    q = torch.ones(1, 2, 1, 6, dtype=torch.bfloat16)
    turned = rotate(q, rotary_angles(torch.tensor([[0, 0, 300], [0, 0, 301]]), 6))
    assert turned.dtype == torch.bfloat16
    assert (turned[:, 0] - turned[:, 1]).abs().max() > 0.1
