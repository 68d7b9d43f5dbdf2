"""AdamW by name: who decays, and who cannot run here."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from regen_dist.config.run import OptimizerConfig
from regen_dist.distributed.optimizer import build_optimizer, fresh_state, set_lr, set_num_updates
from regen_dist.distributed.zero3 import deepspeed_settings
from regen_dist.errors import BackendError, ConfigError
from tests.helpers.tiny import tiny_run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _params() -> list[torch.Tensor]:
    return [torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (3,), (4, 3, 2, 1, 1), (1,))]


def test_matrices_decay_and_vectors_do_not() -> None:
    """With no gradient to follow, decay is all that moves: kernels and matrices shrink, biases and gains stay."""
    params = _params()
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.5, lr=0.1), params, CPU)
    assert isinstance(optimizer, torch.optim.AdamW)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param in params:
        torch.testing.assert_close(param, torch.full_like(param, 0.95 if param.ndim > 1 else 1.0))


def test_a_sharded_parameter_decays_by_its_full_shape() -> None:
    """Under ZeRO-3 every parameter is flat on its rank; what counts is the shape it has when whole."""
    flat = torch.nn.Parameter(torch.ones(6))
    flat.ds_shape = torch.Size((3, 2))  # type: ignore[attr-defined]
    groups = build_optimizer(OptimizerConfig(weight_decay=0.5), [flat], CPU).param_groups
    assert [group["weight_decay"] for group in groups if group["params"]] == [0.5]


def test_the_learning_rate_reaches_every_group() -> None:
    """Both groups follow the schedule."""
    optimizer = build_optimizer(OptimizerConfig(), _params(), CPU)
    set_lr(optimizer, 0.123)
    assert [group["lr"] for group in optimizer.param_groups] == [0.123, 0.123]


def test_state_made_early_equals_state_made_by_the_first_step() -> None:
    """Moments that exist before the first step change nothing in it, and the number of updates is where AdamW looks."""
    results = []
    for early in (False, True):
        (param,) = [torch.nn.Parameter(torch.ones(3, 2))]
        config = OptimizerConfig(lr=0.1)
        optimizer = build_optimizer(config, [param], CPU)
        if early:
            optimizer.state[param] = fresh_state(config, param)
        for value in (0.5, 2.0):
            param.grad = torch.full_like(param, value)
            optimizer.step()
        results.append((param, optimizer.state[param]))
    (a, a_state), (b, b_state) = results
    assert torch.equal(a, b)
    assert a_state.keys() == b_state.keys()
    assert all(torch.equal(a_state[name], b_state[name]) for name in a_state)
    set_num_updates(optimizer, 40)
    assert float(optimizer.state[b]["step"]) == 40


@pytest.mark.parametrize(
    ("kind", "device", "message"),
    [
        ("fused_adam", CPU, r"apex\) needs a CUDA device, found cpu; set optimizer\.kind=adamw"),
        ("cpu_adam", CPU, r"is DeepSpeed's; set engine\.kind=zero3, or optimizer\.kind=adamw"),
        ("cpu_adam", CUDA, r"the model is on cuda; set optimizer\.kind=adamw"),
    ],
)
def test_what_cannot_run_on_a_device_is_refused(kind: str, device: torch.device, message: str) -> None:
    """A BackendError that says why and what to set."""
    with pytest.raises(BackendError, match=message):
        build_optimizer(OptimizerConfig(kind=kind), _params(), device)


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="apex is installed")
def test_fused_adam_without_apex_is_refused() -> None:
    """The package is named, with the warning that PyPI's apex is another one."""
    with pytest.raises(BackendError, match=r"needs NVIDIA apex, .*PyPI's `apex` is another package"):
        build_optimizer(OptimizerConfig(kind="fused_adam"), _params(), CUDA)


def test_deepspeed_is_told_what_the_config_says() -> None:
    """Batch, accumulation, clipping, precision: DeepSpeed's settings follow from ours, and their product is right."""
    config = tiny_run(train__batch_global=24, train__accumulation=3, optimizer__clip_norm=0.7, engine__precision="bf16")
    settings = deepspeed_settings(config, world_size=4)
    assert settings["train_micro_batch_size_per_gpu"] * 4 * 3 == settings["train_batch_size"] == 24
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.7
    assert settings["bf16"]["enabled"]
    assert settings["zero_optimization"]["stage"] == 3


def test_zero_is_cut_as_the_config_says() -> None:
    """DeepSpeed's own config object takes every key; ranks must divide into hpZ's groups."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = tiny_run(
        engine__kind="zero3", engine__zero__prefetch_bucket=7, engine__zero__sub_group=9,
        engine__zero__partition_size=4, train__batch_global=24,
    )  # fmt: skip
    told = DeepSpeedZeroConfig(**deepspeed_settings(config, world_size=8)["zero_optimization"])
    assert (told.prefetch_bucket_size, told.sub_group_size, told.zero_hpz_partition_size) == (7, 9, 4)
    with pytest.raises(ConfigError, match=r"partition_size 4 does not divide the 6 ranks"):
        deepspeed_settings(config, world_size=6)


@pytest.mark.parametrize(
    ("asked", "precision", "world_size", "said"),
    [
        ("auto", "bf16", 8, "bf16"), ("auto", "bf16", 63, "bf16"), ("auto", "bf16", 64, "fp32"),
        ("auto", "fp32", 8, "fp32"), ("bf16", "bf16", 512, "bf16"), ("fp32", "bf16", 8, "fp32"),
    ],
)  # fmt: skip
def test_gradients_are_reduced_in_fp32_where_ranks_are_many(
    asked: str, precision: str, world_size: int, said: str
) -> None:
    config = tiny_run(
        engine__kind="zero3", engine__precision=precision, engine__zero__communication_dtype=asked,
        train__batch_global=world_size,
    )  # fmt: skip
    assert deepspeed_settings(config, world_size)["communication_data_type"] == said


def test_one_pass_over_the_state_is_the_same_rule() -> None:
    """The fused kernel of the CPU beside torch's one that is made of single operations."""
    config = OptimizerConfig(weight_decay=0.1, lr=1e-2)
    ours, plain = ([torch.nn.Parameter(torch.linspace(-1, 1, 35).view(5, 7))] for _ in range(2))
    optimizers = [
        build_optimizer(config, ours, CPU),
        torch.optim.AdamW(plain, lr=1e-2, betas=config.betas, weight_decay=0.1, foreach=False, fused=False),
    ]
    for step in range(5):
        for params, optimizer in zip((ours, plain), optimizers, strict=True):
            params[0].grad = torch.sin(torch.arange(35.0).view(5, 7) + step)
            optimizer.step()
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=1e-7)


def test_on_gpus_the_default_is_torchs_fused_kernel() -> None:
    """One kernel instead of ten passes, with its count of updates beside the parameter, where that kernel wants it."""
    config = OptimizerConfig()
    params = [torch.nn.Parameter(torch.empty(3, 2, device="meta"))]
    optimizer = build_optimizer(config, params, CUDA)
    assert optimizer.defaults["fused"]
    assert not optimizer.defaults["foreach"]
    optimizer.state[params[0]] = fresh_state(config, params[0])
    set_num_updates(optimizer, 7)
    step = optimizer.state[params[0]]["step"]
    assert (step.device, step.dtype, step.shape) == (params[0].device, torch.float32, ())


class _ApexFusedAdam(torch.optim.Optimizer):
    """The interface of apex/optimizers/fused_adam.py: `step` counted once a group, in the group, from the first call
    on; `zero_grad` without arguments; moments made where there is no state. Only its kernel is written in torch."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if len(group["params"]) == 0:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            for p in group["params"]:
                if p.grad is not None:
                    self._kernel(p, group)

    def _kernel(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), step = self.state[p], group["betas"], group["step"]
        if len(state) == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        assert p.grad is not None
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * state["exp_avg"] / (1 - beta1**step) / root)


@pytest.mark.parametrize("early", [True, False], ids=["state made early", "state made by apex"])
@pytest.mark.parametrize("sub_groups", [1, 3])
def test_fused_adam_follows_adamw_through_sub_groups_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sub_groups: int, early: bool
) -> None:
    """ZeRO-3 hands parameters over one after the other and calls `step` for each; a resumed run restores moments and
    number of updates into a fresh optimizer. Both must be the updates that torch's AdamW makes, each of them."""
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = _ApexFusedAdam  # type: ignore[attr-defined]
    (tmp_path / "optimizers").mkdir()  # by which NVIDIA's apex is known from PyPI's
    apex.__spec__ = ModuleSpec("apex", None, is_package=True)
    apex.__spec__.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    config = OptimizerConfig(kind="fused_adam", weight_decay=0.1, lr=1e-2)
    ours, torchs = ([torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3) * (i + 1)) for i in range(3)] for _ in "ab")
    fused = build_optimizer(config, ours, CUDA)
    reference = torch.optim.AdamW(torchs, lr=1e-2, betas=config.betas, weight_decay=0.1)

    def update(step: int) -> None:
        for mine, other in zip(ours, torchs, strict=True):
            mine.grad, other.grad = torch.sin(mine.detach() + step), torch.sin(other.detach() + step)
        for part in range(sub_groups):
            fused.param_groups[0]["params"] = ours[part::sub_groups]
            fused.step()
        fused.param_groups[0]["params"] = ours
        fused.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in ours)
        reference.step()
        for mine, other in zip(ours, torchs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)

    if early:
        fused.state.update({p: fresh_state(config, p) for p in ours})
    for step in range(5):
        update(step)
    kept = {p: {name: fused.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq")} for p in ours}
    fused = build_optimizer(config, ours, CUDA)  # the resumed run
    for p in ours:
        fused.state[p] = fresh_state(config, p) | kept[p]
    set_num_updates(fused, 5)
    for step in range(5, 10):
        update(step)
