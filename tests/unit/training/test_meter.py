"""The figures of a stretch of steps, on a clock that the test holds."""

from __future__ import annotations

import time

import pytest
import torch

from regen_dist.distributed.engine import StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.training.metrics import StepMeter

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
