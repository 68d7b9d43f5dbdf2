"""Ranks whose devices do not fit are told so before they join."""

from __future__ import annotations

from typing import Any

import pytest

from regen_dist.distributed.rendezvous import misfit


def _told(device: str = "cuda", gpu: str = "", host: str = "n0", problem: str = "") -> dict[str, Any]:
    return {"device": device, "gpu": gpu, "host": host, "problem": problem}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([_told(gpu="a"), _told(gpu="b"), _told(gpu="a", host="n1")], ""),
        ([_told("cpu"), _told("cpu")], ""),
        ([_told(), _told()], ""),  # a torch that tells no ids
        ([_told(gpu="a"), _told("cpu", host="n7")], "1 ranks have a GPU and 1 do not: rank 1 on n7"),
        ([_told(gpu="a"), _told(gpu="b"), _told(gpu="a")], "rank 0 on n0, rank 2 on n0 share a GPU"),
        ([_told(gpu="a"), *[_told("", problem="too old")] * 12], "and 4 more: too old"),
    ],
)
def test_what_does_not_fit_is_named(told: list[dict[str, Any]], said: str) -> None:
    found = misfit(told)
    assert said in found
    assert bool(said) == bool(found)
