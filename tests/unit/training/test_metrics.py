"""Metrics: figures of a stretch of steps, the learning rate, samples that were seen, and slow ranks."""

from __future__ import annotations

import itertools
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.run import OptimizerConfig
from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.data.loading.plan import BadSample
from regen_dist.distributed.engine import StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.evaluation.sheet import write_sheet
from regen_dist.observe.record import read_record
from regen_dist.training.metrics import (
    RankClock,
    RankReport,
    RankTimes,
    Reporter,
    SampleLog,
    StepMeter,
    compared,
    learning_rate,
)
from regen_dist.training.task import Validation
from tests.helpers.tiny import tiny_run

RESULT = StepResult(True, 0.5)


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def _step(
    meter: StepMeter, clock: Clock, losses: list[float], wait_s: float, work_s: float, flops: float = 0.0, bad: int = 0
) -> None:
    for loss in losses:
        with meter.waiting():
            clock.now += wait_s
        clock.now += work_s
        meter.add(torch.tensor(loss, requires_grad=True), {"other": torch.tensor(10 * loss)}, flops, bad)
    meter.end_step()


def test_speed_wait_and_mfu(clock: Clock) -> None:
    """Two steps of two micro-batches in 8 s, 2 s of them waiting, 6 clips and 1.2e13 operations a step at a peak of
    5e12 a second."""
    meter = StepMeter(Ranks(), clips_per_step=6, peak_tflops=5.0)
    for losses in ([1.0, 2.0], [3.0, 6.0]):
        _step(meter, clock, losses, wait_s=0.5, work_s=1.5, flops=6e12, bad=1)
    figures = meter.read(lr=0.1, result=RESULT)
    assert figures["loss"] == pytest.approx(3.0)
    assert figures["other"] == pytest.approx(30.0)
    assert figures["step_s"] == pytest.approx(4.0)
    assert figures["clips_per_s"] == pytest.approx(1.5)
    assert figures["data_wait"] == pytest.approx(0.25)
    assert figures["mfu"] == pytest.approx(2 * 6 * 2e12 / 8 / 5e12)
    assert (figures["lr"], figures["grad_norm"]) == (0.1, 0.5)
    assert (figures["bad_samples"], figures["clips"]) == (4, 12)
    assert figures["memory_bytes"] > 1 << 20


def test_each_reading_starts_anew(clock: Clock) -> None:
    """Figures are of the steps since the last reading, not of the whole run."""
    meter = StepMeter(Ranks(), 4, 1.0)
    _step(meter, clock, [8.0], 1.0, 1.0)
    meter.read(0.1, RESULT)
    _step(meter, clock, [2.0], 0.0, 4.0)
    figures = meter.read(0.1, RESULT)
    assert figures["loss"] == 2.0
    assert figures["step_s"] == pytest.approx(4.0)
    assert figures["data_wait"] == 0.0


def test_mfu_counts_every_rank(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is that of all ranks, and losses are means over ranks."""
    monkeypatch.setattr(Ranks, "sum", lambda self, values: [2 * value for value in values])
    meter = StepMeter(Ranks(0, 2, 0), 4, 1.0)
    _step(meter, clock, [3.0], 0.0, 2.0, flops=2e12, bad=1)
    figures = meter.read(0.1, RESULT)
    assert figures["loss"] == 3.0
    assert figures["mfu"] == pytest.approx(4e12 / 2 / 2e12)
    assert figures["bad_samples"] == 2


def test_validation_and_saving_are_not_training_time(clock: Clock) -> None:
    """Neither their time nor the losses before them are lost: they are left out of the clock, and the sums go on."""
    meter = StepMeter(Ranks(), 4, 1.0)
    _step(meter, clock, [3.0], 0.0, 2.0)
    with meter.paused():
        clock.now += 1000
    _step(meter, clock, [1.0], 0.0, 2.0)
    figures = meter.read(0.1, RESULT)
    assert figures["step_s"] == pytest.approx(2.0)
    assert figures["loss"] == 2.0


def test_cpu_time_is_counted_without_pauses(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Clock()
    monkeypatch.setattr(time, "process_time", cpu)
    meter = StepMeter(Ranks(), clips_per_step=1, peak_tflops=1.0)
    for _ in range(2):
        _step(meter, clock, [1.0], wait_s=1.0, work_s=1.0)
        cpu.now += 1.5
    with meter.paused():
        cpu.now += 100.0
    assert meter.read(lr=0.1, result=RESULT)["cpu_step_s"] == pytest.approx(1.5)


BAD = BadSample("a.tar", "one", "the bytes differ")
OTHER = BadSample("a.tar", "two", "not found")


def batch(*ids: int, bad: tuple[BadSample, ...] = (), problem: str | None = None) -> ClipBatch:
    return ClipBatch(torch.empty(0), torch.tensor(ids), bad=bad, problem=problem)


def ids(run: EmbedderConfig, rank: int = 0) -> list[tuple[int, int, list[int]]]:
    lines = read_record(run.folder / "samples" / f"rank-{rank:05d}.jsonl", "samples")
    return [(line["step"], line["micro"], line["ids"]) for line in lines]


def noted(run: EmbedderConfig, rank: int = 0) -> list[tuple[int, str]]:
    path = run.folder / "bad_samples" / f"rank-{rank:05d}.jsonl"
    return [(line["step"], line["key"]) for line in read_record(path)] if path.exists() else []


@pytest.fixture
def run(tmp_path: Path) -> EmbedderConfig:
    return tiny_run(tmp_path, train__trace_samples=True)


def write(run: EmbedderConfig, start: int, *notes: tuple[int, ClipBatch], rank: int = 0, world_size: int = 1) -> None:
    log = SampleLog(run, Ranks(rank, world_size), start)
    for step, each in notes:
        log.write(step, 0, each)
    log.close()


def test_ids_are_noted_by_step_and_micro_batch(run: EmbedderConfig) -> None:
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


def test_a_resumed_run_drops_the_notes_of_steps_that_come_again(run: EmbedderConfig) -> None:
    write(run, 0, (1, batch(1)), (2, batch(2, bad=(BAD,))), (3, batch(3, bad=(OTHER,))))
    write(run, 2, (3, batch(30)))
    assert ids(run) == [(1, 0, [1]), (2, 0, [2]), (3, 0, [30])]
    assert noted(run) == [(2, "one")], "also where nothing new is bad"
    untraced = run.model_copy(update={"train": run.train.model_copy(update={"trace_samples": False})})
    write(untraced, 1)
    assert ids(run) == [(1, 0, [1])], "also where ids are noted no more"


def test_a_bad_sample_is_noted_once(run: EmbedderConfig, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, 0, (1, batch(1, bad=(BAD, BAD))), (2, batch(2, bad=(BAD,))))
    write(run, 2, (3, batch(3, bad=(BAD, OTHER))))
    assert noted(run) == [(1, "one"), (3, "two")]
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" is bad")[0] for line in told] == [
        "warning: sample one in a.tar", "warning: sample two in a.tar",
    ]  # fmt: skip


def test_what_another_rank_has_noted_is_known_after_resuming(run: EmbedderConfig) -> None:
    write(run, 0, (1, batch(1, bad=(BAD,))), (4, batch(1, bad=(OTHER,))), rank=1, world_size=2)
    write(run, 2, (3, batch(3, bad=(BAD, OTHER))), rank=0, world_size=2)
    assert noted(run) == [(3, "two")], "what comes again is not known yet"


def test_notes_of_ranks_that_are_no_more_end_at_the_checkpoint(run: EmbedderConfig) -> None:
    for rank in range(3):
        write(run, 0, *((step, batch(rank, bad=(BAD,) * (step == 3))) for step in (1, 2, 3)), rank=rank, world_size=3)
    write(run, 2, rank=0, world_size=2)
    assert [len(ids(run, rank)) for rank in range(3)] == [2, 3, 2], "rank 1 does its own"
    assert [noted(run, rank) for rank in (0, 2)] == [[], []]
    write(run, 2, rank=1, world_size=2)
    assert len(ids(run, 1)) == 2


def test_a_problem_is_told_once(run: EmbedderConfig, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, 0, *((step, batch(1, problem="the disk is full")) for step in range(1, 5)))
    assert capsys.readouterr().err == "warning: the disk is full\n"


# What the reporter writes of a validation.


def test_a_video_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The writer of videos has errors of its own, which are no OSError."""
    run = tiny_run(tmp_path)
    (run.folder / "generated" / "step-00000005" / "00.mp4").mkdir(parents=True)
    reporter, video = Reporter(run, Ranks(), 0), torch.zeros(1, 3, 5, 32, 32)
    reporter.validation(5, Validation({"loss": 1.0}, video, video, "", "", ("a caption",), 8.0), 2.0)
    reporter.close()
    assert "warning: no picture or video of step 5, and the run goes on: " in capsys.readouterr().err


def test_the_picture_of_a_generated_video_has_no_psnr(tmp_path: Path) -> None:
    """It is of the same caption, not of the same video."""
    run = tiny_run(tmp_path)
    reporter, video = Reporter(run, Ranks(), 0), torch.zeros(1, 3, 1, 32, 32)
    reporter.validation(5, Validation({"loss": 1.0}, video, video, "loss 1", "generated", ("a caption",), 8.0), 2.0)
    reporter.close()
    grey = [np.full((32, 32, 3), 128, np.uint8)]
    label = ("Validation", "through the embedder")
    expected, wrong = tmp_path / "expected.png", tmp_path / "wrong.png"
    made = {"generated": grey}
    write_sheet(expected, [0], grey, made, title="step 5: loss 1", source_label=label, psnr=False, errors=False)
    write_sheet(wrong, [0], grey, made, title="step 5: loss 1", source_label=label, errors=False)
    picture = (run.folder / "pictures" / "step-00000005.png").read_bytes()
    assert picture == expected.read_bytes() != wrong.read_bytes()


def test_a_validation_before_the_first_step_stands_there_once(tmp_path: Path) -> None:
    """A run that is killed before its first checkpoint begins anew, with that validation; one that goes back to an
    imported checkpoint of step 0 does not validate again."""
    for loss in (1.0, 2.0):
        reporter = Reporter(tiny_run(tmp_path), Ranks(), 0)
        reporter.validation(0, Validation({"loss": loss}), 2.0)
        reporter.rewind(0)
        reporter.close()
    lines = read_record(tiny_run(tmp_path).folder / "metrics.jsonl", "validation")
    assert [(line["loss"], line["seconds"]) for line in lines] == [(2.0, 2.0)]


# The learning rate is a function of the step.


CONFIG = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)


def test_warmup_is_linear_and_starts_above_zero() -> None:
    """The first step already learns; the last step of the warm-up reaches the full rate."""
    assert [learning_rate(CONFIG, step, 100) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_from_the_rate_to_its_floor() -> None:
    """Full right after the warm-up, half way between rate and floor in the middle, the floor at the last step (the
    105th) and after."""
    rates = [learning_rate(CONFIG, step, 105) for step in range(4, 120)]
    assert rates[0] == pytest.approx(1.0)
    assert rates[50] == pytest.approx(0.55)
    assert rates[99] > rates[100]
    assert rates[100:] == pytest.approx([0.1] * 16)
    assert all(after <= before for before, after in itertools.pairwise(rates))


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 5), (5, 5), (9, 5)])
def test_odd_lengths(warmup: int, total: int) -> None:
    """No warm-up, a warm-up as long as the run or longer: a finite rate within its limits at every step."""
    config = CONFIG.model_copy(update={"warmup_steps": warmup})
    assert all(0 < learning_rate(config, step, total) <= 1.0 for step in range(total))


# Which ranks are slow. Real ranks are compared in tests/dist/test_ranks.py.


SLOW_S = 0.3


def test_the_slow_rank_is_named(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its data wait where that is slow, and by its processor's time where it computes more; each report is of its
    own steps."""
    cpu, told, reports = Clock(), list[RankTimes](), list[RankReport]()
    monkeypatch.setattr(time, "process_time", cpu)
    monkeypatch.setattr(Ranks, "gather", lambda self, own: told.append(own) or told[-2:])
    clocks = [RankClock(Ranks(rank, 2)) for rank in range(2)]
    for wait_s, work_s in ((SLOW_S, 0.0), (0.0, SLOW_S)):
        for rank, each in enumerate(clocks):
            for _ in range(3):
                with each.step():
                    with each.waiting():
                        clock.now += rank * wait_s
                    clock.now += 1.0
                    cpu.now += rank * work_s
            reports.append(each.report())
    _, waits, _, computes = reports
    host = socket.gethostname()
    assert f"data wait 0.000 / 0.150 / 0.300 s (most: rank 1 on {host} 0.300, rank 0 on {host} 0.000)" in waits.text
    assert f"CPU time 0.000 / 0.150 / 0.300 s (most: rank 1 on {host} 0.300, rank 0" in computes.text
    assert waits.figures["ranks/step_s_max"] == pytest.approx(1 + SLOW_S)
    assert [each.figures["ranks/data_wait_s_max"] for each in (waits, computes)] == pytest.approx([SLOW_S, 0.0])
    assert [each.figures["ranks/cpu_s_max"] for each in (waits, computes)] == pytest.approx([0.0, SLOW_S])


def test_the_worst_three_are_named() -> None:
    """Of many, in order, with their hosts."""
    times = [RankTimes(rank, f"node{rank // 2}", rank % 5 / 10, 1.0, 0.5) for rank in range(8)]
    report = compared(times)
    assert "data wait 0.000 / 0.150 / 0.400 s (most: rank 4 on node2 0.400, rank 3 on node1 0.300, rank 2 on" in (
        report.text
    )
    assert report.figures["ranks/step_s_median"] == 1.0
    assert report.text.count("rank ") == 9
