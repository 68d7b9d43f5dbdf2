"""Counts, on the meta device, what one forward pass of a model computes and keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Pass(NamedTuple):
    """One forward pass: operations by part, those that checkpointing does again, and bytes kept for the backward
    pass."""

    forward_flops: dict[str, int]
    recomputed_flops: int
    activation_bytes: int


def count_pass(model: nn.Module, forward: Callable[[], object], activation_checkpointing: bool) -> Pass:
    """Count `forward`, which calls the model once."""
    units = _checkpointed_units(model)
    with FlopCounterMode(display=False) as counter, _Saved(model, units) as saved:
        output = forward()
    flops = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    del output  # what the backward pass needs lives as long as this
    recomputed = sum(_flops_of(flops, model, name) for name in units)
    return Pass(
        forward_flops={name: _flops_of(flops, model, name) for name, _ in model.named_children()},
        recomputed_flops=recomputed if activation_checkpointing else 0,
        activation_bytes=saved.checkpointed_bytes() if activation_checkpointing else saved.num_bytes(),
    )


def _flops_of(flops: dict[str, int], model: nn.Module, name: str) -> int:
    """Operations of a part; those of a list are its members', because it is never called itself."""
    part = model.get_submodule(name)
    if isinstance(part, nn.ModuleList):
        return sum(_flops_of(flops, model, f"{name}.{index}") for index in range(len(part)))
    return flops.get(f"{type(model).__name__}.{name}", 0)


def _checkpointed_units(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that are recomputed as a whole when activation checkpointing is on, by name."""
    owners = [(name, each) for name, each in model.named_modules() if hasattr(each, "activation_checkpointing")]
    return {
        f"{owner_name}.{list_name}.{index}".removeprefix("."): unit
        for owner_name, owner in owners
        for list_name, units in owner.named_children()
        if isinstance(units, nn.ModuleList)
        for index, unit in enumerate(units)
    }


class _Saved(TorchFunctionMode):
    """Counts what autograd keeps for the backward pass, weights apart: each storage once, by the unit that kept it."""

    def __init__(self, model: nn.Module, units: dict[str, nn.Module]) -> None:
        super().__init__()
        self.weights = {_storage(parameter) for parameter in model.parameters()}
        self.units = units
        self.unit = ""  # the one that runs now; "" between units
        self.fused = False
        self.kept: dict[str, dict[int, Tensor]] = {"": {}, **{name: {} for name in units}}
        self.inputs: dict[int, Tensor] = {}
        self.scope = self._watch()

    def num_bytes(self) -> int:
        """Kept without checkpointing."""
        return _bytes({key: each for kept in self.kept.values() for key, each in kept.items()})

    def checkpointed_bytes(self) -> int:
        """Kept with checkpointing: what lies outside the units, their inputs, and one unit while it is recomputed."""
        largest = max((_bytes(self.kept[name]) for name in self.units), default=0)
        return _bytes({**self.kept[""], **self.inputs}) + largest

    def __enter__(self) -> _Saved:
        super().__enter__()  # type: ignore[no-untyped-call]
        self.scope.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.scope.__exit__(*error)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A fused attention kernel keeps inputs and output; on the meta device it is made of parts that keep more."""
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.fused = True
        output = function(*args, **(kwargs or {}))  # [..., N, L, E], laid out as the kernels do: [..., L, N, E]
        output = output.transpose(-3, -2).contiguous().transpose(-3, -2)
        self.fused = False
        for tensor in (*args, output):
            self._keep(tensor)
        return output

    @contextmanager
    def _watch(self) -> Iterator[None]:
        handles = [unit.register_forward_pre_hook(self._entering(name)) for name, unit in self.units.items()]
        handles += [unit.register_forward_hook(self._left) for unit in self.units.values()]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def enter(unit: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.unit = name
            self.inputs |= {_storage(each): each for each in tree_leaves(inputs) if isinstance(each, Tensor)}

        return enter

    def _left(self, unit: nn.Module, inputs: Any, output: Any) -> None:
        self.unit = ""

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if not self.fused and storage not in self.weights:
            self.kept[self.unit].setdefault(storage, tensor)
        return tensor


def _storage(tensor: Tensor) -> int:
    """Tells storages apart; on the meta device all data pointers are zero."""
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
