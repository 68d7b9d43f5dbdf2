"""AdamW by name: who decays, and who cannot run here."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from regen_dist.config.schema import OptimizerConfig
from regen_dist.distributed.engine import deepspeed_settings
from regen_dist.distributed.optimizer import build_optimizer, fresh_state, set_lr, set_num_updates
from regen_dist.errors import BackendError
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
    with pytest.raises(BackendError, match=r"needs NVIDIA apex .*PyPI's `apex` is another package"):
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
