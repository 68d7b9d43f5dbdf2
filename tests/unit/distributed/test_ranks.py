"""Ranks: identity of a process, its part of a parameter, and the kernels that determinism allows it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from regen_dist.distributed.environment import RankInfo, meeting_port, rank_variables, read_rank_info
from regen_dist.distributed.ranks import Ranks, chunk, make_repeatable, process_group, read_environment
from regen_dist.errors import ConfigError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
SUBMITIT = {"SUBMITIT_LOCAL_GLOBALID": "3", "SUBMITIT_LOCAL_NTASKS": "8", "SUBMITIT_LOCAL_LOCALID": "1"}
MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks(0, 1, 0)),
        (TORCHRUN, Ranks(3, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks(0, 1, 0)),
        ({**SLURM, **MEETING}, Ranks(3, 8, 1)),
        ({**TORCHRUN, **SLURM, **MEETING}, Ranks(3, 8, 1)),
        (SLURM, Ranks(0, 1, 0)),  # in an allocation, but started by hand
        ({**SUBMITIT, **MEETING}, Ranks(3, 8, 1)),
        ({**TORCHRUN, **SLURM, **SUBMITIT, **MEETING}, Ranks(3, 8, 1)),
        ({**TORCHRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, Ranks(3, 8, 1)),
    ],
    ids=[
        "alone",
        "torchrun",
        "one-rank",
        "slurm",
        "both-agree",
        "allocation-by-hand",
        "submitit",
        "all-agree",
        "torchrun-in-one-task",
    ],
)
def test_the_environment_gives_the_place(environment: dict[str, str], expected: Ranks) -> None:
    """torchrun's variables, Slurm's, both, or none."""
    assert read_environment(environment) == expected


def test_a_disagreement_is_an_error() -> None:
    """Two launchers that say different things are not settled by choosing one of them."""
    with pytest.raises(ConfigError, match=r"Start the ranks by one of them"):
        read_environment({**TORCHRUN, **SLURM, **MEETING, "SLURM_PROCID": "4"})
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS.* of 8.*SUBMITIT_LOCAL_NTASKS.* of 9"):
        read_environment({**SLURM, **SUBMITIT, **MEETING, "SUBMITIT_LOCAL_NTASKS": "9"})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"), ({"RANK": "x"}, "must be whole numbers")],
)
def test_values_that_make_no_sense(change: dict[str, str], message: str) -> None:
    """A rank beyond the number of ranks, or no number."""
    with pytest.raises(ConfigError, match=message):
        read_environment({**TORCHRUN, **change})


def test_what_a_rank_is_told_is_what_it_reads() -> None:
    """The variables that the launcher sets, and a meeting port of its own for each start."""
    told = rank_variables(RankInfo(5, 8, 1), local_world_size=4, address="node1", port=meeting_port("job 7", 0))
    assert read_rank_info(told) == RankInfo(5, 8, 1)
    assert told["MASTER_ADDR"] == "node1"
    ports = {meeting_port(f"job {job}", restart) for job in range(10) for restart in range(10)}
    assert len(ports) > 90
    assert all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 6, 64, 1001])
def test_chunks_cover_without_overlap(size: int, world_size: int) -> None:
    """Every element of a parameter belongs to exactly one rank, in order; no chunk is longer than the even share."""
    chunks = [chunk(size, world_size, rank) for rank in range(world_size)]
    held = [element for low, high in chunks for element in range(low, high)]
    assert held == list(range(size))
    assert all(high - low <= -(-size // world_size) for low, high in chunks)


def test_one_rank_needs_no_others() -> None:
    """Sums, votes and what rank 0 does are what a process alone says, without a process group; errors too."""
    ranks = Ranks()
    with process_group(ranks, needed=False):
        assert ranks.sum([1.5, 2.0]) == [1.5, 2.0]
        assert ranks.agree(True)
        assert not ranks.agree(False)
        assert ranks.gather("x") == ["x"]
        assert ranks.on_main(lambda: 7) == 7
        assert ranks.apart() == ranks
        ranks.barrier()
        ranks.raise_together(None)
        with pytest.raises(ConfigError, match="mine"):
            ranks.raise_together(ConfigError("mine"))
        with pytest.raises(ZeroDivisionError):
            ranks.on_main(lambda: 1 // 0)


# `engine.deterministic`: which kernels a process may use.


@pytest.fixture
def restored_determinism(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    mode, flags = torch.get_deterministic_debug_mode(), (cudnn.deterministic, cudnn.benchmark)
    yield
    torch.set_deterministic_debug_mode(mode)
    cudnn.deterministic, cudnn.benchmark = flags
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("restored_determinism")
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


@pytest.mark.usefixtures("restored_determinism")
def test_what_cannot_be_repeated_is_an_error() -> None:
    make_repeatable(torch.device("cuda"), deterministic=True)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.nn.functional.max_unpool2d(torch.ones(1, 1, 2, 2), torch.tensor([[[[0, 3], [8, 11]]]]), 2)
