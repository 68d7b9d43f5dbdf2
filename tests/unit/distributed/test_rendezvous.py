"""Ranks whose devices do not fit are told so before they join."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest

from launcher.supervise import rank_environments
from regen_dist.distributed.environment import JOIN_S, join_timeout_s, left_over_advice, without_ranks
from regen_dist.distributed.rendezvous import find_mismatch
from regen_dist.errors import ConfigError


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


_MEET = """
import sys, time, torch
from datetime import timedelta
from regen_dist.distributed import rendezvous
from regen_dist.errors import RegenError
rendezvous._NOTICE_S = 0.5
time.sleep(float(sys.argv[2]))
try:
    store = rendezvous.rendezvous_ranks(int(sys.argv[1]), 2, torch.device("cpu"), "", timedelta(minutes=2))
except RegenError as error:
    sys.exit(f"error: {error}")
if sys.argv[1] == "0":
    sys.stdin.read()  # its store ends with it, or with the variable: the others must have met before
"""


def _start(environment: Mapping[str, str], rank: int, late_s: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _MEET, str(rank), str(late_s)]
    return subprocess.Popen(command, env=dict(environment), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_nobody_started_are_not_waited_for(rank: int) -> None:
    """Rank 0 serves the store and waits for clients, another looks for a server: both end, name the variables, and say
    the way out; before that, a line says who is waited for."""
    base = {**without_ranks(os.environ), **rank_environments({}, 2)[rank], JOIN_S: "2"}
    with _start(base, rank) as process:
        _, told = process.communicate(timeout=120)
    lines = [line for line in told.splitlines() if "did not meet" in line]
    assert process.returncode == 1
    assert len(lines) == 1, told
    assert f"RANK={rank} WORLD_SIZE=2" in lines[0]
    assert "unset " in lines[0]
    assert "MASTER_ADDR" in lines[0].partition("unset ")[2]
    assert "waits for the others, 2 s at most" in told
    assert "Traceback" not in told


def test_ranks_that_come_late_are_waited_for() -> None:
    """Well after the notice; as ranks that somebody starts one after the other."""
    base = {**without_ranks(os.environ), JOIN_S: "120"}
    began = time.monotonic()
    first, second = (
        _start({**base, **environment, JOIN_S: "120"}, rank, late_s=2.0 * rank)
        for rank, environment in rank_environments({}, 2).items()
    )
    with first, second:
        assert second.wait(timeout=120) == 0, time.monotonic() - began
        first.communicate(timeout=120)
        assert first.returncode == 0


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
