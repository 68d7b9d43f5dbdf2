"""Time and dollars of a run by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from regen_dist.models.memory import Assumptions, Cost
from regen_dist.observe.hardware import GPU_PEAK_TFLOPS

# 16 GPUs of 100 TFLOP/s, of which half is used: 800 TFLOP/s together.
ASSUMED = Assumptions(
    mfu=0.5, peak_tflops=100, gpus_per_node=8, nvlink_gbps=800, network_gbps=80, dollars_per_gpu_hour=2
)
COST = Cost(
    world_size=16,
    model_flops=1600 * 10**12,
    recomputed_flops=400 * 10**12,
    sent_bytes=10**9,
    steps=1800,
    assumed=ASSUMED,
)


def test_time_and_dollars_follow_from_the_operations() -> None:
    facts = COST.facts()
    assert facts["computation_s"] == facts["step_s"] == pytest.approx(2.0)
    assert facts["days"] == pytest.approx(1 / 24)
    assert facts["gpu_hours"] == pytest.approx(16)
    assert facts["dollars"] == pytest.approx(32)


def test_what_is_computed_again_is_in_the_hfu_and_in_nothing_else() -> None:
    plain = replace(COST, recomputed_flops=0)
    assert (COST.hfu, plain.hfu) == (pytest.approx(0.625), pytest.approx(0.5))
    assert {**COST.facts(), "hfu": 0} == {**plain.facts(), "hfu": 0}


def test_communication_can_hide_behind_computation() -> None:
    facts = COST.facts()
    assert facts["network_bytes_per_node"] == 10**9
    assert facts["communication_s"] == pytest.approx(0.1)
    assert facts["communication_can_hide"]


def test_communication_that_takes_longer_sets_the_step() -> None:
    facts = replace(COST, sent_bytes=40 * 10**9).facts()
    assert not facts["communication_can_hide"]
    assert facts["step_s"] == facts["communication_s"] == pytest.approx(4.0)
    assert facts["mfu"] == pytest.approx(0.25)
    assert facts["dollars"] == pytest.approx(64)


def test_the_default_peak_is_that_of_the_gpu_table() -> None:
    assert Assumptions().peak_tflops == GPU_PEAK_TFLOPS["H100"]
