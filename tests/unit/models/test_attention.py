"""Attention, to itself and to text: kernels that agree, exact windows, ignored padding, rotary positions, cost."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.config.embedder import AttentionConfig
from regen_dist.errors import BackendError
from regen_dist.models.attention import Grid, attention, cross_attention, rotary_angles, rotate, split_pairs
from regen_dist.models.attention_kernels import require_flash

BACKENDS = ("sdpa", "eager", "reference")
ODD = [
    ((5, 7, 9), (2, 3, 4)),
    ((9, 8, 8), (9, 4, 4)),
    ((1, 5, 6), (4, 2, 3)),  # the window is larger than an axis
    ((3, 2, 11), (8, 8, 4)),
    ((4, 4, 4), (2, 2, 2)),
    ((5, 3, 3), (1, 3, 3)),
    ((9, 1, 1), (4, 1, 1)),
]


def _qkv(grid: Grid, batch: int = 2, heads: int = 2, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, math.prod(grid), width, generator=generator).unbind(0)
    return 2 * q, 2 * k, v


def _boxes(grid: Grid, window: Grid, shifted: bool) -> Tensor:
    """Which box each token is in, [L, 3]: by division, where the library cuts the axes into runs."""
    axes = []
    for length, size in zip(grid, window, strict=True):
        shift = size // 2 if shifted and size < length else 0
        axes.append(torch.tensor([math.floor((place - shift) / size) for place in range(length)]))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention over the tokens that a mask [L, L] allows, written out."""
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(backend: str) -> None:
    """sdpa, eager, reference and windows with one window compute the same attention."""
    grid = (3, 4, 5)
    q, k, v = _qkv(grid)
    expected = _masked(q, k, v, torch.ones(60, 60, dtype=torch.bool))
    for window in ((3, 4, 5), (9, 8, 8)):
        for pattern in ("full", "window"):
            for shifted in (False, True):
                config = AttentionConfig(backend=backend, pattern=pattern, window=window)
                torch.testing.assert_close(attention(q, k, v, grid, config, shifted), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), ODD)
def test_each_token_attends_to_exactly_its_own_box(grid: Grid, window: Grid, shifted: bool, backend: str) -> None:
    """Also where the windows do not divide the grid, and where a window is larger than an axis: equal to full
    attention under a mask."""
    q, k, v = _qkv(grid)
    boxes = _boxes(grid, window, shifted)
    mask = (boxes[:, None] == boxes[None]).all(-1)
    config = AttentionConfig(backend=backend, pattern="window", window=window)
    torch.testing.assert_close(attention(q, k, v, grid, config, shifted), _masked(q, k, v, mask), rtol=1e-5, atol=1e-5)


def _seen(shifts: list[bool], source: int) -> Tensor:
    """Tokens of a (4, 8, 8) grid that change when token `source` does, after one attention per entry of `shifts`."""
    grid, config = (4, 8, 8), AttentionConfig(pattern="window", window=(2, 4, 4))
    _, _, x = _qkv(grid, batch=1)
    changed = x.clone()
    changed[:, :, source] += 1
    for shifted in shifts:
        x, changed = (attention(y, y, y, grid, config, shifted) for y in (x, changed))
    return (x != changed).any(-1).all((0, 1)).view(grid)


def test_other_windows_have_no_influence() -> None:
    """Bit for bit: what happens in one window changes that window and nothing else."""
    seen = _seen([False], 0)
    assert seen[:2, :4, :4].all()
    assert seen.sum() == 2 * 4 * 4


def test_shifted_layers_connect_the_windows() -> None:
    """A layer with shifted windows carries information across the borders that unshifted layers never cross."""
    source = (1 * 8 + 3) * 8 + 3  # the last token of the first window, on the border in all three axes
    alone, connected = _seen([False, False], source), _seen([False, True], source)
    assert alone.sum() == 2 * 4 * 4
    assert connected[:, 4:, 4:].any()
    assert connected[2:].any()
    assert _seen([False, True, False, True, False, True], source).all()


def _flops(grid: Grid, pattern: str) -> int:
    q, k, v = _qkv(grid)
    config = AttentionConfig(backend="eager", pattern=pattern, window=(2, 4, 4))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, grid, config)
    return counter.get_total_flops()


def test_windows_cost_linear_and_full_attention_quadratic() -> None:
    """Twice the frames, or twice the columns: twice the work with windows, four times with full attention."""
    for larger in ((8, 8, 8), (4, 8, 16)):
        assert _flops(larger, "window") == 2 * _flops((4, 8, 8), "window")
        assert _flops(larger, "full") == 4 * _flops((4, 8, 8), "full")


def test_flash_is_refused_where_it_cannot_run() -> None:
    """A BackendError that says why, and which value mends it: on the CPU, in float32, without the package."""
    q, k, v = _qkv((1, 2, 2))
    with pytest.raises(BackendError, match=r"needs a CUDA device, found cpu.*backend=sdpa"):
        attention(q, k, v, (1, 2, 2), AttentionConfig(backend="flash"))
    with pytest.raises(BackendError, match=r"computes in bf16, found fp32"):
        require_flash("cuda", torch.float32, (8, 0))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_without_its_package_is_refused() -> None:
    """The missing package is named, and so is what to do without it."""
    with pytest.raises(BackendError, match=r"package flash-attn .*; install it, or set .*backend=sdpa"):
        require_flash("cuda", torch.bfloat16, (8, 0))


class _FullSize(TorchDispatchMode):
    """Counts operations that write as many numbers as there are in a row."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += isinstance(out, Tensor) and not function.is_view and out.numel() >= self.numbers
        return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shifted", [False, True])
def test_the_backward_pass_of_windows_writes_few_full_size_tensors(backend: str, shifted: bool) -> None:
    """However many boxes there are: when each was cut out by itself, a shifted layer wrote more than 200."""
    grid, config = (
        (9, 12, 12),
        AttentionConfig.model_validate({"backend": backend, "pattern": "window", "window": [4, 4, 4]}),
    )
    q, k, v = (each.requires_grad_() for each in _qkv(grid, batch=1, width=64))
    mixed = attention(q, k, v, grid, config, shifted)
    upstream = torch.ones_like(mixed)
    with _FullSize(mixed.numel()) as found:
        mixed.backward(upstream)
    assert found.count <= 16


@pytest.mark.parametrize("shifted", [False, True])
def test_gradients_of_windows_are_those_under_a_mask(shifted: bool) -> None:
    grid, window = (5, 7, 9), (2, 3, 4)
    boxes = _boxes(grid, window, shifted)
    mask = (boxes[:, None] == boxes[None]).all(-1)
    config, grads = AttentionConfig(backend="eager", pattern="window", window=window), []
    for windowed in (True, False):
        q, k, v = (each.requires_grad_() for each in _qkv(grid))
        mixed = attention(q, k, v, grid, config, shifted) if windowed else _masked(q, k, v, mask)
        mixed.square().sum().backward()
        grads.append([each.grad for each in (q, k, v)])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Attention to text: kernels that agree, padding that changes nothing.

LENGTHS = (5, 2, 7)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]  # [3, 7]


def _padded_qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 6, 8, generator=generator)
    k, v = torch.randn(2, 3, 2, 7, 8, generator=generator).unbind(0)
    return q, k, v


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_text_is_attended_to_without_its_padding(backend: str) -> None:
    """A batch of padded texts gives what each text gives by itself, cut to its tokens and written out."""
    q, k, v = _padded_qkv()
    mixed = cross_attention(q, k, v, MASK, backend)
    for index, length in enumerate(LENGTHS):
        scores = q[index] @ k[index, :, :length].transpose(-1, -2) / math.sqrt(8)
        torch.testing.assert_close(mixed[index], scores.softmax(-1) @ v[index, :, :length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_in_the_padding_changes_nothing(backend: str) -> None:
    """Bit for bit, whatever it is."""
    q, k, v = _padded_qkv()
    padding = ~MASK[:, None, :, None]
    filled = cross_attention(q, k.masked_fill(padding, 50.0), v.masked_fill(padding, torch.nan), MASK, backend)
    assert torch.equal(filled, cross_attention(q, k, v, MASK, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_without_tokens_gives_zeros_and_finite_gradients(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in _padded_qkv())
    mask = MASK & torch.tensor([[True], [False], [True]])
    mixed = cross_attention(q, k, v, mask, backend)
    mixed.square().sum().backward()
    assert not mixed[1].any()
    assert mixed[0].all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_flash_to_text_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(BackendError, match=r"needs a CUDA device.*attention\.backend=sdpa"):
        cross_attention(*_padded_qkv(), MASK, "flash")


# Rotary positions: relative, without a table, exact in float32.


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
