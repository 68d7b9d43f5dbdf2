"""What `regen bench step` makes of what it sees: groups of a profile, ratios, estimates, the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import record_function

from regen_dist.config.run import EngineConfig
from regen_dist.models.flops import count_flops, count_row_flops
from regen_dist.models.memory import memory_bytes
from tests.helpers.tiny import tiny_run, tiny_t2v
from tools.bench import step_rank
from tools.bench.common import Turn
from tools.bench.step import step_figures, table
from tools.bench.step_rank import matrix_peak, section, steps_case, tensor_peak

CLIPS = {"samples": 4, "frames": 5, "size": [32, 32]}
ROWS = {"samples": 4, "frames": 4, "size": [4, 4], "text_tokens": 7}


@dataclass
class Event:
    """As the profiler has them."""

    name: str
    self_cpu_time_total: float = 1.0
    cpu_parent: Event | None = None


class TestProfile:
    @pytest.mark.parametrize(
        ("name", "group"),
        [
            ("aten::addmm", step_rank.PRODUCTS),
            ("aten::bmm", step_rank.ATTENTION),
            ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", step_rank.ATTENTION),
            ("aten::convolution_backward", step_rank.CONVOLUTIONS),
            ("aten::native_layer_norm_backward", step_rank.NORMS),
            ("aten::silu_backward", step_rank.ACTIVATIONS),
            ("aten::copy_", step_rank.ELEMENTWISE),
            ("autograd::engine::evaluate_function: AddmmBackward0", step_rank.REST),
        ],
    )
    def test_an_operator_has_a_group(self, name: str, group: str) -> None:
        assert step_rank.group_of(Event(name)) == group

    def test_a_marked_stretch_owns_what_is_in_it(self) -> None:
        inside = Event("aten::mm", cpu_parent=Event("Optimizer.step", cpu_parent=Event("update")))
        assert step_rank.group_of(inside) == step_rank.UPDATE

    def test_shares_are_of_the_whole(self) -> None:
        found = step_rank.shares([Event("aten::mm", 3.0), Event("aten::mul", 1.0)])
        assert (found[step_rank.PRODUCTS], found[step_rank.ELEMENTWISE]) == (0.75, 0.25)
        assert found.keys() == set(step_rank.GROUPS)

    def test_a_real_profile_has_forward_and_backward(self) -> None:
        weight = torch.ones(64, 64, requires_grad=True)

        def step() -> None:
            with record_function("noise"):
                noise = torch.randn(64, 64)
            F.gelu(noise @ weight).sum().backward()

        found = step_rank.profiled(step, 2)
        assert sum(found["groups"].values()) == pytest.approx(1.0)
        for group in (step_rank.PRODUCTS, step_rank.ACTIVATIONS, step_rank.NOISE):
            assert found["groups"][group] > 0
        assert any(name.startswith("aten::mm (") for name in found["operators"])


class TestUtilisation:
    def test_a_turn_counts_its_own_steps(self) -> None:
        done = [0.0]
        peaks = iter([1.0, 3.0])

        def step() -> None:
            done[0] += 5.0

        def flops() -> float:
            counted, done[0] = done[0], 0.0
            return counted

        step()  # a warm one
        turn = steps_case(step, flops, lambda: next(peaks), 4)()
        assert (turn.amount, turn.facts["peak"], turn.facts["steps"]) == (20.0, 3.0, 4)

    def test_the_share_of_the_peak(self) -> None:
        facts = {"peak": 100.0, "cpu_s": 4.0, "steps": 2}
        rounds = {"kept": [Turn(100.0, 2.0, facts)], "again": [Turn(100.0, 2.0, facts | {"cpu_s": 5.0})]}
        found = section(rounds, threads=2, against={"again": "kept"})
        case = found["cases"]["kept"]
        assert case["mfu"]["median"] == 0.5, "50 a second of 100"
        assert case["mfu_by_cpu"]["median"] == 0.5, "25 a CPU second of 50"
        assert (case["flops_per_step"], case["step_s"]["median"]) == (50.0, 1.0)
        assert found["time_ratios"]["again"]["median"] == 1.25

    def test_the_peak_is_measured(self) -> None:
        assert 1e8 < matrix_peak(torch.device("cpu"), torch.float32, seconds=0.01)() < 1e14


def test_the_peak_of_tensors_is_of_what_lives_at_once() -> None:
    before = [torch.zeros(10_000)]

    def work() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        del first
        before.clear()
        third = torch.zeros(500)
        del second, third

    assert tensor_peak(work) == 4 * 3000
    assert tensor_peak(lambda: None) == 0


def _rank(*cpu_s: float, peak_bytes: int = 100, sample: dict[str, Any] = CLIPS) -> dict[str, Any]:
    steps = [{"cpu_s": each, "seconds": each / 2} for each in cpu_s]
    return {"steps": steps, "peak_bytes": peak_bytes, "sample": sample, "parameters": 7, "loss": 0.5}


class TestRanks:
    def test_cpu_time_is_of_all_ranks(self) -> None:
        """The slowest rank's clock, and the median of the steps."""
        job = [_rank(1.0, 9.0, 2.0), _rank(1.0, 1.0, 3.0)]
        assert (step_rank.cpu_s(job), step_rank.wall_s(job)) == (5.0, 1.5)

    def test_ratios_are_within_a_round(self) -> None:
        jobs = {"one": [[_rank(1.0)], [_rank(4.0)]], "two": [[_rank(1.0), _rank(1.0)], [_rank(2.0), _rank(2.0)]]}
        found = step_rank.compared(jobs, "one")
        assert found["cpu_ratios"] == {"two": {"median": 1.5, "min": 1.0, "max": 2.0}}

    def test_memory_stands_beside_the_estimate_of_describe(self) -> None:
        """For the batch that was trained on, of the fullest rank."""
        config = tiny_run()
        counted = count_flops(config.model, (32, 32), precision="fp32")
        whole = sum(memory_bytes(counted, config.engine, world_size=1, clips_per_gpu=4).values())
        tensors = [{"tensor_bytes": whole, "sample": CLIPS}, {"tensor_bytes": 2 * whole, "sample": CLIPS}]
        found = step_rank.memory([_rank(1.0, peak_bytes=3 * whole)], tensors, config)
        assert (found["estimated_bytes"], found["ratio"], found["resident_ratio"]) == (whole, 2.0, 3.0)

    def test_rows_are_estimated_too(self) -> None:
        config = tiny_t2v(engine__kind="zero3", engine__activation_checkpointing=True)
        counted = count_row_flops(config.model, 4, (4, 4), 7, precision="fp32", activation_checkpointing=True)
        terms = step_rank.estimate(ROWS, config, world_size=2, resident=True)
        assert terms["activations of 4 rows"] == 4 * counted.activation_bytes
        on_gpu = memory_bytes(counted, config.engine, world_size=2, clips_per_gpu=4)
        changed = {name for name in terms if terms[name] != on_gpu[name]}
        assert changed == {"gradients on their way: a bucket, and its copy"}
        assert terms.popitem()[0] == "activations of 4 rows"

    def test_in_host_memory_a_bucket_takes_what_is_written(self) -> None:
        counted = count_flops(tiny_run().model, (32, 32))
        name = "gradients on their way: a bucket, and its copy"
        terms = memory_bytes(counted, EngineConfig(), world_size=2, clips_per_gpu=1, on_gpu=False)
        assert terms[name] == 3 * 2 * counted.num_parameters, "the bucket, and two copies, in bf16"


FACTS: dict[str, Any] = {
    "precision": "fp32",
    "utilisation": section(
        {name: [Turn(1e9, 1.0, {"peak": 2e9, "cpu_s": 1.0, "steps": 1})] for name in ("embedder", "embedder, again")},
        threads=1,
        against={"embedder, again": "embedder"},
    )
    | {"profile": {"embedder": {"groups": dict.fromkeys(step_rank.GROUPS, 0.1)}}},
    "memory": {
        "embedder": {
            "tensor_bytes": 2e6,
            "estimated_bytes": 2e6,
            "ratio": 1.0,
            "resident_bytes": 3e6,
            "resident_ratio": 1.5,
        }
    },
    "sharding": step_rank.compared({"one": [[_rank(1.0)]], "two": [[_rank(1.0), _rank(1.0)]]}, "one")
    | {"target": 1.3, "memory": {}},
    "against": {"embedder": step_rank.compared({"there": [[_rank(2.0)]], "here": [[_rank(1.0)]]}, "there")},
}


def test_the_table_names_targets_and_what_was_measured() -> None:
    text = table(FACTS)
    rows = [line for line in text.splitlines() if line.startswith("| embedder: the model's operations")]
    assert rows == [
        "| embedder: the model's operations over float32 matrix products on 1 thread, 2 GFLOP/s | "
        "1.00 s a step of 1 GFLOP | 0.50 (0.50 to 0.50) | ≥ 0.6 |"
    ]
    assert "| two, 0 million parameters: CPU time of a step | 2.00 s | 2.00 (2.00 to 2.00) | ≤ 1.3 |" in text
    assert "| embedder: CPU time of a step, here beside there | 1.000 s | 0.50 (0.50 to 0.50) |  |" in text
    assert "| matrix products | 10.0% |" in text


def test_parts_that_were_left_out_are_missing() -> None:
    assert table({"precision": "fp32"}).count("\n") == 2
    assert list(step_figures({})) == []


def test_figures_say_what_is_better() -> None:
    found = {figure.name: figure for figure in step_figures(FACTS)}
    assert found["embedder, of the peak, by CPU time"].higher_is_better
    assert not found["embedder, peak of tensors, bytes"].higher_is_better
    assert found["embedder, peak resident bytes"].value == 3e6
    assert found["two, CPU time beside one process"].value == 2.0


@pytest.mark.parametrize("name", ["step_embedder", "step_t2v", "step_sharded"])
def test_the_configs_are_as_wide_as_the_target_asks(name: str, root: Path) -> None:
    from regen_dist.config import EmbedderConfig, load_config

    config = load_config(root / f"configs/bench/{name}.yaml")
    width = config.model.decoder.width if isinstance(config, EmbedderConfig) else config.model.width
    assert width >= 512
