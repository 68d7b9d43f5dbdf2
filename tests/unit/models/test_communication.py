"""The bytes of ZeRO-3 by hand; tests/dist/test_communication.py compares them with a real step."""

from __future__ import annotations

import pytest

from regen_dist.config.run import EngineConfig
from regen_dist.models.memory import network_bytes, sent_bytes, wire_seconds

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
