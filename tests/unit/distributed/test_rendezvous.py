"""Ranks whose devices do not fit are told so before they join."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import Store

from launcher.supervise import rank_environments
from regen_dist.distributed import rendezvous
from regen_dist.distributed.environment import JOIN_S, join_timeout_s, left_over_advice, without_ranks
from regen_dist.distributed.rendezvous import find_mismatch
from regen_dist.errors import ConfigError, RegenError


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
    found = find_mismatch(told)
    assert said in found
    assert bool(said) == bool(found)


def _start(rank: int, join_s: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Store]:
    """Set the variables of a rank of two, which waits so long for the other; return the rendezvous of a rank."""
    own = {**without_ranks(os.environ), **rank_environments({}, 2)[rank], JOIN_S: join_s}
    for name in os.environ.keys() - own.keys():
        monkeypatch.delenv(name)
    for name in own:
        monkeypatch.setenv(name, own[name])
    monkeypatch.setattr(rendezvous, "_NOTICE_S", 0.3)
    return lambda each: rendezvous.rendezvous_ranks(each, 2, torch.device("cpu"), "", timedelta(minutes=2))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_nobody_started_are_not_waited_for(
    rank: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 serves the store and waits for clients, another looks for a server: both end, name the variables, and say
    the way out; before that, a line says who is waited for."""
    meet = _start(rank, "1", monkeypatch)
    with pytest.raises(RegenError, match=rf"rank {rank} of 2 did not meet .*RANK={rank} WORLD_SIZE=2") as caught:
        meet(rank)
    assert "MASTER_ADDR" in str(caught.value).partition("unset ")[2]
    told = capfd.readouterr().err
    assert "waits for the others, 1 s at most" in told
    assert "Traceback" not in told


def test_ranks_that_come_late_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Well after the notice; as ranks that somebody starts one after the other."""
    meet = _start(0, "60", monkeypatch)
    with ThreadPoolExecutor(2) as ranks:
        first = ranks.submit(meet, 0)
        time.sleep(1.0)
        assert not first.done()
        assert ranks.submit(meet, 1).result()
        assert first.result()
    assert "rank 0 of 2 waits for the others, 60 s at most" in capfd.readouterr().err


def test_how_long_others_are_waited_for() -> None:
    """A minute where only variables speak of them; long where our launcher, torchrun or a scheduler has started them;
    what the user says counts before that."""
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "old"}
    task = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert join_timeout_s(alone) == 60
    assert join_timeout_s({**alone, "TORCHELASTIC_RUN_ID": "1"}) == 1800
    assert join_timeout_s({**alone, "TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}) == 60
    assert join_timeout_s({**alone, **task}) == 1800
    assert join_timeout_s(rank_environments({}, 2)[1]) == 1800
    assert join_timeout_s({**alone, JOIN_S: "600"}) == 600
    for wrong in ("soon", "0", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"{JOIN_S}='{wrong}'"):
            join_timeout_s({JOIN_S: wrong})
    advice = left_over_advice({**alone, "TORCHELASTIC_RUN_ID": "1"})
    assert "unset MASTER_ADDR RANK TORCHELASTIC_RUN_ID WORLD_SIZE" in advice
