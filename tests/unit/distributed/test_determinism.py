"""`engine.deterministic`: which kernels a process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from regen_dist.distributed.ranks import make_repeatable


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    mode, flags = torch.get_deterministic_debug_mode(), (cudnn.deterministic, cudnn.benchmark)
    yield
    torch.set_deterministic_debug_mode(mode)
    cudnn.deterministic, cudnn.benchmark = flags
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(
    ("device", "asked", "mode", "cudnn", "benchmark"),
    [("cuda", True, 2, True, False), ("cuda", False, 0, False, True), ("cpu", False, 1, False, False)],
)
def test_kernels_are_restricted_on_gpus_where_it_is_asked_for(
    device: str, asked: bool, mode: int, cudnn: bool, benchmark: bool
) -> None:
    """Strictly, for under a mere warning attention's backward pass would stay free."""
    make_repeatable(torch.device(device), deterministic=asked)
    assert torch.get_deterministic_debug_mode() == mode
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (cudnn, benchmark)
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == (device == "cuda" and asked)


def test_what_cannot_be_repeated_is_an_error() -> None:
    make_repeatable(torch.device("cuda"), deterministic=True)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.nn.functional.max_unpool2d(torch.ones(1, 1, 2, 2), torch.tensor([[[[0, 3], [8, 11]]]]), 2)
