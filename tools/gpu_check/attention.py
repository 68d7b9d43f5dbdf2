"""Attention: every backend against a reference implementation, forward and backward, and its speed.

Legend: B batch, N heads, L tokens, M text tokens, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from regen_dist.config.embedder import AttentionConfig
from regen_dist.errors import BackendError
from regen_dist.models.attention import Grid, cross_attention
from regen_dist.models.attention import attention as attend
from regen_dist.models.attention_kernels import BACKENDS
from tools.gpu_check.machine import Machine, relative_error, require_close

_FUSED = ("sdpa", "flash")  # the others keep all scores
_TEXTS = (5, 0, 77)  # tokens of each: one text has none


def attention(machine: Machine) -> dict[str, Any]:
    """Compare every backend that runs here, over grids, windows and texts; then take the fused ones' time."""
    runs, missing = [], {}
    for backend in BACKENDS:
        try:
            errors = {what: _compare(machine, what, case, backend) for what, case in _cases(machine)}
        except BackendError as error:
            missing[backend] = str(error).partition(";")[0]
            continue
        runs.append((backend, errors))
    timed = {backend: _speed(machine, backend) for backend, _ in runs if backend in _FUSED}
    fastest = {shape: max(found[shape]["tflops"] for found in timed.values()) for shape in next(iter(timed.values()))}
    summary = ", ".join(f"L = {shape}: {tflops:.3g} TFLOP/s" for shape, tflops in fastest.items())
    return {
        "errors": dict(runs),
        "not_run": missing,
        "speed": timed,
        "summary": f"{', '.join(name for name, _ in runs)} agree; {summary}",
    }


Case = Callable[[str], tuple[tuple[Tensor, ...], Callable[..., Tensor]]]


def _cases(machine: Machine) -> Iterator[tuple[str, Case]]:
    """Yield the comparisons by name: inputs and the function of a backend."""
    grid = machine.size((9, 24, 40), (3, 6, 5))
    for pattern, shifted in (("full", False), ("window", False), ("window", True)):
        name = f"{pattern}{', shifted' if shifted else ''}"
        yield name, lambda backend, p=pattern, s=shifted: _self(machine, grid, backend, p, s)  # type: ignore[misc]
    yield "text", lambda backend: _cross(machine, backend)


def _self(machine: Machine, grid: Grid, backend: str, pattern: str, shifted: bool) -> Any:
    config = AttentionConfig.model_validate({"backend": backend, "pattern": pattern, "window": [4, 4, 4]})
    inputs = _random(machine, *[(2, 4, prod(grid), machine.size(128, 16))] * 3)
    return inputs, lambda q, k, v: attend(q, k, v, grid, config, shifted)


def _cross(machine: Machine, backend: str) -> Any:
    length, most, width = machine.size(960, 24), max(_TEXTS), machine.size(128, 16)
    mask = (torch.arange(most) < torch.tensor(_TEXTS)[:, None]).to(machine.device)
    shapes = [(len(_TEXTS), 4, tokens, width) for tokens in (length, most, most)]
    return _random(machine, *shapes), lambda q, k, v: cross_attention(q, k, v, mask, backend)


def _compare(machine: Machine, what: str, case: Case, backend: str) -> dict[str, float]:
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


def _random(machine: Machine, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator(machine.device).manual_seed(0)
    made = (torch.randn(shape, device=machine.device, generator=generator) for shape in shapes)
    return tuple(each.to(machine.dtype) for each in made)


def _speed(machine: Machine, backend: str) -> dict[str, dict[str, Any]]:
    """Return TFLOP/s of forward and backward pass, at the decoder's row length and at the 5B transformer's."""
    shapes = machine.size(((31_680, 16, 128), (1_920, 24, 128)), ((512, 2, 32), (128, 2, 32)))
    kernel, found = BACKENDS[backend].build.attend, dict[str, dict[str, Any]]()
    for length, heads, width in shapes:
        q, k, v = (each.requires_grad_() for each in _random(machine, *[(1, heads, length, width)] * 3))
        upstream = torch.ones_like(q)

        def both(q: Tensor = q, k: Tensor = k, v: Tensor = v, upstream: Tensor = upstream) -> None:
            torch.autograd.grad(kernel(q, k, v), (q, k, v), upstream)

        seconds = machine.seconds(both)
        flops = 3.5 * 4 * heads * length**2 * width  # the backward pass has five products to the forward pass' two
        found[str(length)] = {"heads": heads, "width": width, "seconds": seconds, "tflops": flops / seconds / 1e12}
    return found
