"""`regen gpu-check`: parts that cannot harm each other, and an exit code that can be trusted."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch.autograd import DeviceType
from typer.testing import CliRunner

from regen_dist.config.run import OptimizerConfig
from regen_dist.errors import BackendError, ConfigError, RegenError
from tests.helpers.machine import wait_until_gone
from tools.cli import app
from tools.gpu_check import command, numerics, speed
from tools.gpu_check import machine as machine_module
from tools.gpu_check import worker as worker_module
from tools.gpu_check.command import PARTS, Part, all_passed, chosen_parts, run_part, training_part
from tools.gpu_check.machine import Machine, PartLeftOut, relative_error, require_close
from tools.gpu_check.speed import train_for
from tools.gpu_check.worker import run_check

ROOT = Path(__file__).parents[3]


def test_every_part_exists_and_says_what_it_proves() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    for part in (*PARTS, training_part(1.0)):
        module, name = part.function.split(":")
        assert f"def {name}(machine: Machine)" in (ROOT / "tools" / "gpu_check" / f"{module}.py").read_text()
        assert f"| `{part.name}` |" in page


def test_unknown_parts_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="no such part; there are versions, attention"):
        chosen_parts(["versions", "absent"])
    assert [part.name for part in chosen_parts(["zero3", "versions"])] == ["versions", "zero3"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_machine_without_a_gpu_is_refused_with_the_way_out() -> None:
    done = CliRunner().invoke(app, ["gpu-check"])
    assert isinstance(done.exception, BackendError)
    assert "no CUDA device" in str(done.exception)
    assert "--cpu" in str(done.exception)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are lines of Python, in the place of the functions of a worker."""
    monkeypatch.setattr(command, "python", lambda *given: [os.sys.executable, "-c", given[2], *given[3:]])  # type: ignore[attr-defined]


def _run(code: str, folder: Path, limit_s: float = 60.0) -> dict[str, Any]:
    return run_part(Part("part", code, "nothing", limit_s), folder, cpu=True)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("raise SystemExit(3)", "ended with exit code 3 and without a result"),
        ("pass", "ended with exit code 0 and without a result"),
        ("1 / 0", "ended with exit code 1 and without a result"),
    ],
)
def test_whatever_kills_a_part_is_its_failure_alone(code: str, said: str, tmp_path: Path) -> None:
    found = _run(code, tmp_path)
    assert (found["status"], found["summary"]) == ("failed", said)
    assert "ZeroDivisionError" in found["log"] or "1 / 0" not in code


@pytest.mark.usefixtures("worker")
def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = (
        f"import subprocess, time; p = subprocess.Popen(['sleep', '300']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(300)"
    )
    found = _run(code, tmp_path, limit_s=5.0)
    assert found["status"] == "failed"
    assert "not done after 5 s" in found["summary"]
    wait_until_gone([int((tmp_path / "pid").read_text())])


@pytest.mark.parametrize(
    ("statuses", "passed"),
    [
        (["passed", "passed"], True),
        (["passed", "left out"], True),
        (["passed", "failed"], False),
        (["left out"], False),
        ([], False),
    ],
)
def test_the_check_passes_only_if_something_did_and_nothing_failed(statuses: list[str], passed: bool) -> None:
    assert all_passed([{"status": status} for status in statuses]) is passed


def test_one_failed_part_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(part: Part, folder: Path, **_: Any) -> dict[str, Any]:
        status = "failed" if part.name == "zero3" else "passed"
        return {"part": part.name, "status": status, "summary": "", "seconds": 1.0, "log": "the end"}

    monkeypatch.setattr(command, "run_part", ran)
    done = CliRunner().invoke(app, ["gpu-check", "--cpu", "--json"])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["passed"] is False
    assert [each["part"] for each in told["parts"]] == [part.name for part in PARTS]
    assert CliRunner().invoke(app, ["gpu-check", "--cpu", "--only", "versions"]).exit_code == 0


def test_errors_of_a_part_become_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(torch.device("cpu"))

    def made(error: Exception | None) -> dict[str, Any]:
        def part(machine: Machine) -> dict[str, Any]:
            if error:
                raise error
            return {"figure": 1, "summary": "fine"}

        monkeypatch.setattr(machine_module, "versions", part)
        return run_check("machine:versions", machine)

    assert made(None) == {"status": "passed", "summary": "fine", "facts": {"figure": 1}}
    assert made(PartLeftOut("needs more"))["status"] == "left out"
    assert made(RegenError("wrong"))["summary"] == "wrong"
    assert "ZeroDivisionError: x" in made(ZeroDivisionError("x"))["facts"]["traceback"]


@pytest.mark.parametrize(("gib", "status"), [(23.6, "left out"), (79.1, "failed")])
def test_a_part_that_a_small_gpu_has_no_room_for_is_left_out(
    monkeypatch: pytest.MonkeyPatch, gib: float, status: str
) -> None:
    """On one of 80 GB, for which the parts are sized, it fails."""
    monkeypatch.setattr(machine_module, "versions", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(total_memory=gib * 2**30))
    found = run_check("machine:versions", Machine(torch.device("cuda", 0)))
    assert found["status"] == status
    assert ("24 GiB of this GPU" in found["summary"]) == (status == "left out")


def test_a_comparison_fails_where_numbers_differ_or_are_none() -> None:
    x = torch.ones(4)
    assert require_close("equal", relative_error(x, x), 1e-6) == 0
    for wrong in (x * 1.1, x * torch.nan, x * torch.inf):
        with pytest.raises(RegenError, match="relative error"):
            require_close("wrong", relative_error(wrong, x), 1e-2)


@pytest.mark.parametrize("function", ["numerics:attention", "numerics:convolutions", "numerics:optimizers"])
def test_numeric_parts_run_on_the_cpu(function: str) -> None:
    found = run_check(function, Machine(torch.device("cpu")))
    assert found["status"] == "passed", found


def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend, a convolution and an optimizer that are wrong by a little fail their parts."""
    from regen_dist.models.attention_kernels import BACKENDS
    from regen_dist.models.layers import CausalConv
    from regen_dist.registry import Entry

    machine, kernels = Machine(torch.device("cpu")), BACKENDS["sdpa"].build
    wrong = Entry(kernels._replace(attend=lambda q, k, v: kernels.attend(q, k, v) * 1.01))
    monkeypatch.setitem(BACKENDS._entries, "sdpa", wrong)
    assert "sdpa, full, result" in run_check("numerics:attention", machine)["summary"]
    rest = CausalConv._rest
    monkeypatch.setattr(
        CausalConv, "_rest", lambda self, x, rows: rest(self, x, rows) * (1.05 if x.dtype == torch.bfloat16 else 1)
    )
    assert "frames after it" in run_check("numerics:convolutions", machine)["summary"]
    monkeypatch.setattr(numerics, "set_num_updates", lambda optimizer, updates: None)
    assert run_check("numerics:optimizers", machine)["status"] == "failed"


class _Precise(torch.optim.AdamW):
    """AdamW whose weights are updated in float64, as a fused kernel of CUDA does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                state["step"] += 1
                m, v = state["exp_avg"].lerp_(p.grad, 1 - b1), state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                m, v = m.double() / (1 - b1 ** float(state["step"])), v.double() / (1 - b2 ** float(state["step"]))
                p.copy_(p.double() * (1 - lr * group["weight_decay"]) - lr * m / (v.sqrt() + group["eps"]))


def test_an_optimizer_that_rounds_less_is_far_from_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: OptimizerConfig, weights: list[torch.Tensor], device: torch.device) -> torch.optim.Optimizer:
        decays = (config.weight_decay, 0.0)
        parts = [each for each in weights if each.ndim > 1], [each for each in weights if each.ndim <= 1]
        groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, decays, strict=True)]
        return _Precise(groups, lr=config.lr, betas=config.betas)

    monkeypatch.setattr(numerics, "build_optimizer", build)
    errors = numerics.optimizers(Machine(torch.device("cpu")))["errors"]
    assert max(errors.values()) < numerics._UPDATE_TOLERANCE / 2


@pytest.mark.parametrize(
    ("pace", "true_pace", "trained"),
    [
        (0.125, 0.125, [240]),
        (0.15, 0.125, [200]),  # 25 of 30 seconds are enough
        (5.0, 0.125, [6, 240]),  # the timing run met another program
        (0.0125, 0.125, [2400]),  # too long is not repeated
    ],
)
def test_a_training_far_shorter_than_its_time_is_repeated_at_its_own_pace(
    pace: float, true_pace: float, trained: list[int]
) -> None:
    calls: list[int] = []

    def train(steps: int) -> float:
        calls.append(steps)
        return steps * true_pace

    assert train_for(30.0, pace, train) == trained[-1]
    assert calls == trained


def test_recomputed_operations_count_for_the_hfu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(torch.device("cpu"))
    monkeypatch.setattr(speed, "peak_tflops", lambda device, dtype: 1e3)
    found = speed.t2v_blocks(machine)
    counted = speed._counted(machine, speed.row_config(machine, "plain", 8, activation_checkpointing=True))
    done = found["seconds"] * 1e15
    assert found["mfu"] * done == pytest.approx(3 * counted.num_forward_flops)
    assert found["hfu"] * done == pytest.approx(3 * counted.num_forward_flops + counted.recomputed_flops)


class _Row(NamedTuple):
    """One row of a profile."""

    key: str
    device_type: DeviceType
    is_user_annotation: bool
    self_device_time_total: float = 10.0


def test_the_time_of_a_kernel_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again as that of the operator that started it, or of the annotation around it."""
    rows = [
        _Row("aten::mm", DeviceType.CPU, False),
        _Row("gemm", DeviceType.CUDA, False),
        _Row("step", DeviceType.CUDA, True),
    ]
    recorded = mock.Mock(key_averages=lambda: rows)
    monkeypatch.setattr(speed, "profile", lambda **_: nullcontext(recorded))
    machine = mock.Mock(is_cuda=True)
    assert speed._kernels(machine, lambda: None) == {"gemm": 1.0}


@pytest.mark.parametrize("on_gpu", [True, False])
def test_parts_compute_as_a_training_does(on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolutions that are checked are those that the tuner of a training may choose."""
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        worker_module, "make_repeatable", lambda device, *, deterministic: asked.append((device.type, deterministic))
    )
    monkeypatch.setattr(worker_module, "run_check", lambda *_: {"facts": {}})
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)
    monkeypatch.setattr(
        sys, "argv", ["worker", "versions:check", "--out", str(tmp_path / "out.json"), *([] if on_gpu else ["--cpu"])]
    )
    worker_module.main()
    assert asked == [("cuda" if on_gpu else "cpu", False)]


def test_the_tests_end_with_a_check_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their process is the kernel's to end, as those of the other parts."""
    parents: list[int] = []
    monkeypatch.setattr("launcher.supervise.die_with", lambda parent: parents.append(parent) or (lambda: None))
    monkeypatch.setattr(machine_module, "python", lambda *_: [sys.executable, "-c", "print('1 passed in 1 s')"])
    assert machine_module.tests(Machine(torch.device("cpu"))) == {"summary": "1 passed in 1 s"}
    assert parents == [os.getpid()]


def test_arms_of_another_training_time_are_not_reported_as_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained and measured arms stay, so another time needs another folder."""
    result = {"part": "", "status": "passed", "summary": "", "seconds": 1.0}
    monkeypatch.setattr(command, "run_part", lambda *_, **__: result)
    run = ["gpu-check", "--cpu", "--only", "versions", "--out", str(tmp_path), "--train"]
    for _ in range(2):
        assert CliRunner().invoke(app, [*run, "1"]).exit_code == 0
    refused = CliRunner().invoke(app, [*run, "20"])
    assert isinstance(refused.exception, ConfigError)
    assert "have 1 minutes each, now 20 are asked for; give --train 1, or another --out" in str(refused.exception)
