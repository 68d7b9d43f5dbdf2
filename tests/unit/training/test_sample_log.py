from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regen_dist.config.embedder import RunConfig
from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.data.loading.plan import BadSample
from regen_dist.distributed.ranks import Ranks
from regen_dist.observe.record import read_record
from regen_dist.training.metrics import SampleLog
from tests.helpers.tiny import tiny_run

BAD = BadSample("a.tar", "one", "the bytes differ")
OTHER = BadSample("a.tar", "two", "not found")


def batch(*ids: int, bad: tuple[BadSample, ...] = (), problem: str | None = None) -> ClipBatch:
    return ClipBatch(torch.empty(0), torch.tensor(ids), bad=bad, problem=problem)


def ids(run: RunConfig, rank: int = 0) -> list[tuple[int, int, list[int]]]:
    lines = read_record(run.folder / "samples" / f"rank-{rank:05d}.jsonl", "samples")
    return [(line["step"], line["micro"], line["ids"]) for line in lines]


def noted(run: RunConfig, rank: int = 0) -> list[tuple[int, str]]:
    path = run.folder / "bad_samples" / f"rank-{rank:05d}.jsonl"
    return [(line["step"], line["key"]) for line in read_record(path)] if path.exists() else []


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return tiny_run(tmp_path, train__trace_samples=True)


def write(run: RunConfig, start: int, *notes: tuple[int, ClipBatch], rank: int = 0, world_size: int = 1) -> None:
    log = SampleLog(run, Ranks(rank, world_size), start)
    for step, each in notes:
        log.write(step, 0, each)
    log.close()


def test_ids_are_noted_by_step_and_micro_batch(run: RunConfig) -> None:
    log = SampleLog(run, Ranks(), 0)
    log.write(1, 0, batch(5, 6))
    log.write(1, 1, batch(7, 8))
    assert ids(run) == [(1, 0, [5, 6]), (1, 1, [7, 8])], "at once: the run may be killed"
    log.close()


def test_without_the_option_only_bad_samples_are_noted(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    write(run, 0, (1, batch(1)))
    assert not run.folder.exists()
    write(run, 0, (1, batch(1, bad=(BAD,))))
    assert noted(run) == [(1, "one")]
    assert not (run.folder / "samples").exists()


def test_a_resumed_run_drops_the_notes_of_steps_that_come_again(run: RunConfig) -> None:
    write(run, 0, (1, batch(1)), (2, batch(2, bad=(BAD,))), (3, batch(3, bad=(OTHER,))))
    write(run, 2, (3, batch(30)))
    assert ids(run) == [(1, 0, [1]), (2, 0, [2]), (3, 0, [30])]
    assert noted(run) == [(2, "one")], "also where nothing new is bad"
    untraced = run.model_copy(update={"train": run.train.model_copy(update={"trace_samples": False})})
    write(untraced, 1)
    assert ids(run) == [(1, 0, [1])], "also where ids are noted no more"


def test_a_bad_sample_is_noted_once(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, 0, (1, batch(1, bad=(BAD, BAD))), (2, batch(2, bad=(BAD,))))
    write(run, 2, (3, batch(3, bad=(BAD, OTHER))))
    assert noted(run) == [(1, "one"), (3, "two")]
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" is bad")[0] for line in told] == [
        "warning: sample one in a.tar", "warning: sample two in a.tar",
    ]  # fmt: skip


def test_what_another_rank_has_noted_is_known_after_resuming(run: RunConfig) -> None:
    write(run, 0, (1, batch(1, bad=(BAD,))), (4, batch(1, bad=(OTHER,))), rank=1, world_size=2)
    write(run, 2, (3, batch(3, bad=(BAD, OTHER))), rank=0, world_size=2)
    assert noted(run) == [(3, "two")], "what comes again is not known yet"


def test_notes_of_ranks_that_are_no_more_end_at_the_checkpoint(run: RunConfig) -> None:
    for rank in range(3):
        write(run, 0, *((step, batch(rank, bad=(BAD,) * (step == 3))) for step in (1, 2, 3)), rank=rank, world_size=3)
    write(run, 2, rank=0, world_size=2)
    assert [len(ids(run, rank)) for rank in range(3)] == [2, 3, 2], "rank 1 does its own"
    assert [noted(run, rank) for rank in (0, 2)] == [[], []]
    write(run, 2, rank=1, world_size=2)
    assert len(ids(run, 1)) == 2


def test_a_problem_is_told_once(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, 0, *((step, batch(1, problem="the disk is full")) for step in range(1, 5)))
    assert capsys.readouterr().err == "warning: the disk is full\n"
