"""The model's operations per second of a training step, over those of bare matrix products on the same cores.

The peak is measured before and after each stretch of steps, because what a machine can do changes while others use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from regen_dist.evaluation.data_speed.turns import Case, Rounds, Turn, ratio, spread
from regen_dist.observe.hardware import peak_tflops

MFU_TARGET = 0.6
PEAK_S = 0.4  # of matrix products, on either side of the steps

Step = Callable[[], object]  # one optimizer step
Flops = Callable[[], float]  # the model's operations in the steps since it was last called
Peak = Callable[[], float]  # operations per second of bare matrix products


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float = PEAK_S) -> Peak:
    """The peak of this process's threads, measured anew at each call (on a known GPU: of its data sheet)."""
    return lambda: peak_tflops(device, dtype, seconds) * 1e12


def steps_case(step: Step, flops: Flops, peak: Peak, steps: int) -> Case:
    """So many steps as one turn: `amount` are operations of the model; `peak` the best rate of bare products before and
    after them, `cpu_s` the CPU seconds of this process."""

    def turn() -> Turn:
        flops()  # of what came before
        before = peak()
        begun, cpu_begun = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_begun
        return Turn(flops(), seconds, {"peak": max(before, peak()), "cpu_s": cpu_s, "steps": steps})

    return turn


def section(rounds: Rounds, *, threads: int, against: Mapping[str, str]) -> dict[str, Any]:
    """The figures of all turns.

    Args:
        rounds: of `steps_case`.
        threads: that the steps and the products ran on.
        against: pairs of cases; how many times as long the first takes as the second is told, round by round.
    """
    return {
        "threads": threads,
        "target": MFU_TARGET,
        "cases": {name: _case(turns, threads) for name, turns in rounds.items()},
        "time_ratios": {name: ratio(_inverse(rounds[name]), _inverse(rounds[base])) for name, base in against.items()},
    }


def _case(turns: list[Turn], threads: int) -> dict[str, Any]:
    return {
        "flops_per_step": turns[0].amount / turns[0].facts["steps"],
        "step_s": spread([turn.seconds / turn.facts["steps"] for turn in turns]),
        "peak_tflops": spread([turn.facts["peak"] / 1e12 for turn in turns]),
        "mfu": spread([turn.rate / turn.facts["peak"] for turn in turns]),
        "mfu_by_cpu": spread([turn.amount / turn.facts["cpu_s"] / (turn.facts["peak"] / threads) for turn in turns]),
    }


def _inverse(turns: list[Turn]) -> list[Turn]:
    """Turns whose rate is CPU seconds per step."""
    return [Turn(turn.facts["cpu_s"], turn.facts["steps"]) for turn in turns]
