"""The bytes of ZeRO-3 and the cost of a run by hand; tests/dist/test_estimates.py compares them with a real step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from regen_dist.config.run import EngineConfig
from regen_dist.models.memory import Assumptions, Cost, network_bytes, sent_bytes, wire_seconds
from regen_dist.observe.hardware import GPU_PEAK_TFLOPS

SIZES = (1000, 600, 100, 50)  # of which two are small
ENGINE = EngineConfig(persistence_threshold=100)


def test_each_micro_batch_gathers_twice_and_reduces_once() -> None:
    sent = sent_bytes(SIZES, ENGINE, world_size=4, accumulation=3)
    assert sent == {
        "weights gathered": 3 * 2 * 1600 * 2 * 3 // 4,
        "gradients reduced": 3 * 1750 * 2 * 3 // 4,
        "small weights gathered after the update": 150 * 2 * 3 // 4,
    }


def test_float32_is_twice_as_much() -> None:
    exact = ENGINE.model_copy(update={"precision": "fp32"})
    doubled = {name: 2 * size for name, size in sent_bytes(SIZES, ENGINE, world_size=2, accumulation=1).items()}
    assert sent_bytes(SIZES, exact, world_size=2, accumulation=1) == doubled


def test_activation_checkpointing_sends_nothing_more() -> None:
    recomputing = ENGINE.model_copy(update={"activation_checkpointing": True})
    counts = {"world_size": 2, "accumulation": 1}
    assert sent_bytes(SIZES, recomputing, **counts) == sent_bytes(SIZES, ENGINE, **counts)


def test_one_gpu_sends_nothing() -> None:
    assert set(sent_bytes(SIZES, ENGINE, world_size=1, accumulation=2).values()) == {0}


@pytest.mark.parametrize(("world_size", "expected"), [(1, 0), (8, 0), (9, 700), (64, 700)])
def test_the_network_is_used_beyond_one_node(world_size: int, expected: int) -> None:
    assert network_bytes(700, world_size=world_size, gpus_per_node=8) == expected


def test_the_slowest_wire_sets_the_time() -> None:
    assert wire_seconds(10**9, 0, nvlink_gbps=80, network_gbps=1) == pytest.approx(0.1)
    assert wire_seconds(10**9, 10**9, nvlink_gbps=80, network_gbps=16) == pytest.approx(0.5)


# Time and dollars of a run by hand.


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
