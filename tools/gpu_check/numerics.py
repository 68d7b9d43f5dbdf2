"""Operations against references: attention kernels, bf16 convolutions, and optimizers with their own kernels.

Legend: B batch, N heads, L tokens, M text tokens, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from regen_dist.config.embedder import AttentionConfig
from regen_dist.config.run import OptimizerConfig
from regen_dist.distributed.optimizer import MOMENTS, build_optimizer, fresh_state, set_num_updates
from regen_dist.errors import BackendError
from regen_dist.models import layers
from regen_dist.models.attention import Grid, cross_attention
from regen_dist.models.attention import attention as attend
from regen_dist.models.attention_kernels import BACKENDS
from regen_dist.models.layers import CausalConv, split_first
from tools.gpu_check.machine import Machine, relative_error, require_close

# Attention: every backend against a reference implementation, forward and backward, and its speed.

_FUSED = ("sdpa", "flash")  # the others keep all scores
_TEXTS = (5, 0, 77)  # tokens of each: one text has none


def attention(machine: Machine) -> dict[str, Any]:
    """Compare every backend that runs here, over grids, windows and texts; then take the fused ones' time."""
    runs, missing = [], {}
    for backend in BACKENDS:
        try:
            errors = {what: _compare_backends(machine, what, case, backend) for what, case in _cases(machine)}
        except BackendError as error:
            missing[backend] = str(error).partition(";")[0]
            continue
        runs.append((backend, errors))
    timed = {backend: _attention_speed(machine, backend) for backend, _ in runs if backend in _FUSED}
    fastest = {shape: max(found[shape]["tflops"] for found in timed.values()) for shape in next(iter(timed.values()))}
    summary = ", ".join(f"L = {shape}: {tflops:.3g} TFLOP/s" for shape, tflops in fastest.items())
    return {
        "errors": dict(runs),
        "not_run": missing,
        "speed": timed,
        "summary": f"{', '.join(name for name, _ in runs)} agree; {summary}",
    }


KernelCase = Callable[[str], tuple[tuple[Tensor, ...], Callable[..., Tensor]]]


def _cases(machine: Machine) -> Iterator[tuple[str, KernelCase]]:
    """Yield the comparisons by name: inputs and the function of a backend."""
    grid = machine.size((9, 24, 40), (3, 6, 5))
    for pattern, shifted in (("full", False), ("window", False), ("window", True)):
        name = f"{pattern}{', shifted' if shifted else ''}"
        yield name, lambda backend, p=pattern, s=shifted: _self(machine, grid, backend, p, s)  # type: ignore[misc]
    yield "text", lambda backend: _cross(machine, backend)


def _self(machine: Machine, grid: Grid, backend: str, pattern: str, shifted: bool) -> Any:
    config = AttentionConfig.model_validate({"backend": backend, "pattern": pattern, "window": [4, 4, 4]})
    inputs = _random_inputs(machine, *[(2, 4, prod(grid), machine.size(128, 16))] * 3)
    return inputs, lambda q, k, v: attend(q, k, v, grid, config, shifted)


def _cross(machine: Machine, backend: str) -> Any:
    length, most, width = machine.size(960, 24), max(_TEXTS), machine.size(128, 16)
    mask = (torch.arange(most) < torch.tensor(_TEXTS)[:, None]).to(machine.device)
    shapes = [(len(_TEXTS), 4, tokens, width) for tokens in (length, most, most)]
    return _random_inputs(machine, *shapes), lambda q, k, v: cross_attention(q, k, v, mask, backend)


def _compare_backends(machine: Machine, what: str, case: KernelCase, backend: str) -> dict[str, float]:
    """Return the relative errors of the result and of each gradient."""
    found, expected = (_run(*case(each)) for each in (backend, "reference"))
    names = ("result", "gradient of q", "gradient of k", "gradient of v")
    errors = {name: relative_error(a, b) for name, a, b in zip(names, found, expected, strict=True)}
    for name, error in errors.items():
        require_close(f"{backend}, {what}, {name}", error, machine.tolerance)
    return errors


def _run(inputs: tuple[Tensor, ...], function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    leaves = [each.clone().requires_grad_() for each in inputs]
    mixed = function(*leaves)
    generator = torch.Generator(mixed.device).manual_seed(1)
    mixed.backward(torch.randn(mixed.shape, device=mixed.device, generator=generator).to(mixed.dtype))
    return (mixed, *(leaf.grad for leaf in leaves if leaf.grad is not None))


def _random_inputs(machine: Machine, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator(machine.device).manual_seed(0)
    made = (torch.randn(shape, device=machine.device, generator=generator) for shape in shapes)
    return tuple(each.to(machine.dtype) for each in made)


def _attention_speed(machine: Machine, backend: str) -> dict[str, dict[str, Any]]:
    """Return TFLOP/s of forward and backward pass, at the decoder's row length and at the 5B transformer's."""
    shapes = machine.size(((31_680, 16, 128), (1_920, 24, 128)), ((512, 2, 32), (128, 2, 32)))
    kernel, found = BACKENDS[backend].build.attend, dict[str, dict[str, Any]]()
    for length, heads, width in shapes:
        q, k, v = (each.requires_grad_() for each in _random_inputs(machine, *[(1, heads, length, width)] * 3))
        upstream = torch.ones_like(q)

        def both(q: Tensor = q, k: Tensor = k, v: Tensor = v, upstream: Tensor = upstream) -> None:
            torch.autograd.grad(kernel(q, k, v), (q, k, v), upstream)

        seconds = machine.seconds(both)
        flops = 3.5 * 4 * heads * length**2 * width  # the backward pass has five products to the forward pass' two
        found[str(length)] = {"heads": heads, "width": width, "seconds": seconds, "tflops": flops / seconds / 1e12}
    return found


# Causal convolutions in the working precision against float32, at the encoder's shapes and beyond the size at which a
# single cuDNN call is trusted.

_DTYPE, _BF16_TOLERANCE = torch.bfloat16, 2e-2  # on the CPU too: beside float32 there would be nothing to compare


def convolutions(machine: Machine) -> dict[str, Any]:
    """Compare result and gradients at three shapes of the encoder, and the result of a very large tensor."""
    layers.require_cudnn(machine.device.type, _DTYPE)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # what is compared with is exact
    shapes = machine.size(
        ((128, 128, 17, 192, 320, 1), (128, 256, 17, 192, 320, 2), (512, 512, 9, 24, 40, 1)),
        ((8, 8, 5, 16, 24, 1), (8, 16, 5, 16, 24, 2), (16, 16, 3, 8, 8, 1)),
    )
    errors = {_shape_name(*shape): _compare_convolutions(machine, *shape) for shape in shapes}
    large, elements = _large(machine)
    worst = max([large, *(error for each in errors.values() for error in each.values())])
    return {
        "errors": errors,
        "large": {"elements": elements, "error": large},
        "summary": f"largest relative error {worst:.1e}; {elements:.2e} elements in strips",
    }


def _shape_name(channels_in: int, channels_out: int, frames: int, height: int, width: int, stride: int) -> str:
    return f"{channels_in} to {channels_out} channels, {frames}x{height}x{width}, stride {stride}"


def _compare_convolutions(
    machine: Machine, cin: int, cout: int, frames: int, height: int, width: int, stride: int
) -> dict[str, float]:
    torch.manual_seed(0)
    layer = CausalConv(cin, cout, spatial=stride, temporal=stride).to(machine.device, _DTYPE)
    video = torch.randn(1, cin, frames, height, width, device=machine.device).to(_DTYPE)
    results = []
    for each in (layer, _exact(layer)):
        x = video.detach().to(each.weight.dtype, copy=True).requires_grad_()
        first, rest = each(split_first(x))
        assert rest is not None, "a clip has frames after its first"
        (first.float().sum() + rest.float().square().sum() / rest[0, 0].numel()).backward()
        results.append((first, rest, x.grad, each.weight.grad))
    names = ("first frame", "frames after it", "gradient of the input", "gradient of the weights")
    errors = {name: relative_error(a, b) for name, a, b in zip(names, *results, strict=True)}
    for name, error in errors.items():
        require_close(f"{_shape_name(cin, cout, frames, height, width, stride)}: {name}", error, _BF16_TOLERANCE)
    return errors


def _exact(layer: CausalConv) -> CausalConv:
    """Return a copy with the same weights in float32."""
    same = CausalConv(layer.in_channels, layer.out_channels, spatial=layer.stride[1], temporal=layer.stride[0])
    same = same.to(next(layer.parameters()).device)
    same.load_state_dict({name: weight.float() for name, weight in layer.state_dict().items()})
    return same


@torch.no_grad()
def _large(machine: Machine) -> tuple[float, int]:
    """Return the relative error of a convolution that is cut into strips, against float32 on some rows at a time."""
    channels, frames, height, width = machine.size((128, 33, 400, 1152), (8, 5, 24, 16))
    torch.manual_seed(0)
    layer = CausalConv(channels, channels).to(machine.device, _DTYPE)
    video = torch.randn(1, channels, frames, height, width, device=machine.device, dtype=_DTYPE)
    with _strips(machine):
        _, found = layer(split_first(video))
    exact, worst, rows = _exact(layer), 0.0, max(4, height // 16)
    for start in range(0, height, rows):
        worst = max(worst, _error_of_rows(exact, video, found, start, min(start + rows, height)))
    return require_close(f"{video.numel():.2e} elements", worst, _BF16_TOLERANCE), video.numel()


def _strips(machine: Machine) -> AbstractContextManager[object]:
    """Reduce the strip size on the CPU, so that the small tensor is cut too."""
    if machine.is_cuda:
        return nullcontext()
    return mock.patch.multiple(layers, MOST_ELEMENTS=4000, STRIP_ELEMENTS=2000)


def _error_of_rows(exact: CausalConv, video: Tensor, found: Tensor, start: int, stop: int) -> float:
    """Return the error of rows start..stop, which depend on one more row on either side."""
    low, high = max(start - 1, 0), min(stop + 1, video.shape[-2])
    _, expected = exact(split_first(video[..., low:high, :].float()))
    return relative_error(found[..., start:stop, :], expected[..., start - low : stop - low, :])


# Optimizers with their own kernels against torch's plain AdamW: 20 steps, save, resume, 20 more.

_STEPS = 20  # before it is saved, and after
_UPDATE_TOLERANCE = 1e-4  # of float32, after 40 updates
# 1 - rate * decay is a float32: rounded, it alone would make kernels that multiply by it differ by nearly the tolerance
# from those that subtract.
_LR, _DECAY = 2**-10, 2**-3


def optimizers(machine: Machine) -> dict[str, Any]:
    """Compare the weights' way of every kind that runs here with plain AdamW's."""
    shapes = machine.size([(3072, 3072), (3072,), (1,), (7, 13, 3)], [(64, 64), (64,), (1,), (7, 13, 3)])
    errors, missing = {}, {}
    for kind in ("adamw", "fused_adam"):
        config = OptimizerConfig.model_validate({"kind": kind, "lr": _LR, "weight_decay": _DECAY})
        try:
            errors[kind] = _compare_optimizer(machine, config, shapes)
        except BackendError as error:
            missing[kind] = str(error).partition(";")[0]
    worst = max(errors.values())
    return {
        "errors": errors,
        "not_run": missing,
        "summary": f"{', '.join(errors)}: relative error of {2 * _STEPS} updates at most {worst:.1e}"
        + "".join(f"; {kind} not run" for kind in missing),
    }


def _compare_optimizer(machine: Machine, config: OptimizerConfig, shapes: list[tuple[int, ...]]) -> float:
    """Return the relative error of the sum of all updates."""
    start = list(_random_values(machine, shapes, 0))
    expected = _plain(config, machine, start, shapes)
    weights = [each.clone() for each in start]
    with TemporaryDirectory() as folder:
        saved = Path(folder) / "state.safetensors"
        _save(_advance(config, machine, weights, shapes, 0), weights, saved)
        resumed = [torch.zeros_like(each) for each in weights]
        _advance(config, machine, resumed, shapes, _STEPS, saved)
    pairs = zip(resumed, expected, start, strict=True)
    return max(require_close(config.kind, relative_error(a - s, b - s), _UPDATE_TOLERANCE) for a, b, s in pairs)


def _plain(
    config: OptimizerConfig, machine: Machine, start: list[Tensor], shapes: list[tuple[int, ...]]
) -> list[Tensor]:
    """Return the result of torch's single-tensor loop, uninterrupted."""
    weights = [each.clone() for each in start]
    groups = [
        {"params": [each for each in weights if each.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [each for each in weights if each.ndim <= 1], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=False, foreach=False)
    for step in range(2 * _STEPS):
        _update(plain, weights, machine, shapes, step)
    return weights


def _advance(
    config: OptimizerConfig,
    machine: Machine,
    weights: list[Tensor],
    shapes: list[tuple[int, ...]],
    first: int,
    saved: Path | None = None,
) -> torch.optim.Optimizer:
    """Apply `_STEPS` updates from step `first` on, as an engine does."""
    optimizer = build_optimizer(config, weights, machine.device)
    for weight in weights:
        optimizer.state[weight] = fresh_state(config, weight)
    if saved is not None:
        _restore(optimizer, weights, saved)
        set_num_updates(optimizer, first)
    for step in range(first, first + _STEPS):
        _update(optimizer, weights, machine, shapes, step)
    return optimizer


def _update(
    optimizer: torch.optim.Optimizer, weights: list[Tensor], machine: Machine, shapes: list[tuple[int, ...]], step: int
) -> None:
    for weight, gradient in zip(weights, _random_values(machine, shapes, 1 + step), strict=True):
        weight.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _save(optimizer: torch.optim.Optimizer, weights: list[Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    state = {f"weight/{index}": weight for index, weight in enumerate(weights)}
    for index, weight in enumerate(weights):
        state |= {f"{moment}/{index}": optimizer.state[weight][moment] for moment in MOMENTS}
    save_file({name: each.detach().cpu().contiguous() for name, each in state.items()}, path)


def _restore(optimizer: torch.optim.Optimizer, weights: list[Tensor], path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(path)
    for index, weight in enumerate(weights):
        weight.copy_(state[f"weight/{index}"])
        for moment in MOMENTS:
            optimizer.state[weight][moment].copy_(state[f"{moment}/{index}"])


def _random_values(machine: Machine, shapes: list[tuple[int, ...]], seed: int) -> Iterator[Tensor]:
    generator = torch.Generator(machine.device).manual_seed(seed)
    return (torch.randn(shape, device=machine.device, generator=generator) for shape in shapes)
