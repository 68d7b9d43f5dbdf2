"""Attention to text: kernels that agree, padding that changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regen_dist.errors import BackendError
from regen_dist.models.attention import cross_attention

BACKENDS = ("sdpa", "eager", "reference")
LENGTHS = (5, 2, 7)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]  # [3, 7]


def _qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 6, 8, generator=generator)
    k, v = torch.randn(2, 3, 2, 7, 8, generator=generator).unbind(0)
    return q, k, v


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_text_is_attended_to_without_its_padding(backend: str) -> None:
    """A batch of padded texts gives what each text gives by itself, cut to its tokens and written out."""
    q, k, v = _qkv()
    mixed = cross_attention(q, k, v, MASK, backend)
    for index, length in enumerate(LENGTHS):
        scores = q[index] @ k[index, :, :length].transpose(-1, -2) / math.sqrt(8)
        torch.testing.assert_close(mixed[index], scores.softmax(-1) @ v[index, :, :length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_in_the_padding_changes_nothing(backend: str) -> None:
    """Bit for bit, whatever it is."""
    q, k, v = _qkv()
    padding = ~MASK[:, None, :, None]
    filled = cross_attention(q, k.masked_fill(padding, 50.0), v.masked_fill(padding, torch.nan), MASK, backend)
    assert torch.equal(filled, cross_attention(q, k, v, MASK, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_without_tokens_gives_zeros_and_finite_gradients(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in _qkv())
    mask = MASK & torch.tensor([[True], [False], [True]])
    mixed = cross_attention(q, k, v, mask, backend)
    mixed.square().sum().backward()
    assert not mixed[1].any()
    assert mixed[0].all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_flash_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(BackendError, match=r"needs a CUDA device.*attention\.backend=sdpa"):
        cross_attention(*_qkv(), MASK, "flash")
