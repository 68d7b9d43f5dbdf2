"""What a model costs, counted on the meta device: parameters, floating point operations, activations.

Attention counts as two matrix products over the tokens that see each other, 4 L^2 D operations for L tokens of width D
that all do; its matrix of weights is not counted as kept, because no fused kernel keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.config.schema import SPATIAL_COMPRESSION, ModelConfig
from regen_dist.models.embedder import build_model

NUM_LATENT_FRAMES = 2  # the content latent and the motion latent
_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FORWARD_AND_BACKWARD = 3  # the backward pass costs two forward passes: gradients of inputs and of weights


@dataclass(frozen=True)
class Account:
    """Costs of one clip, or of the model, by part (`encoder`, `conditioning`, `decoder`)."""

    clip_shape: tuple[int, int, int, int]  # channels, frames, height, width
    latent_shape: tuple[int, int, int]  # channels, rows, columns of each of the two latent frames
    parameters: dict[str, int]
    forward_flops: dict[str, int]
    recomputed_flops: int  # forward operations done a second time by activation checkpointing
    activation_bytes: int  # kept per clip for the backward pass
    parameter_sizes: tuple[int, ...]  # elements of each parameter

    @property
    def num_parameters(self) -> int:
        """Parameters of all parts."""
        return sum(self.parameters.values())

    @property
    def num_forward_flops(self) -> int:
        """Operations of one forward pass of one clip; a multiplication with an addition counts as two."""
        return sum(self.forward_flops.values())

    @property
    def num_training_flops(self) -> int:
        """Operations of one training step for one clip: forward, backward, and what checkpointing computes again."""
        return _FORWARD_AND_BACKWARD * self.num_forward_flops + self.recomputed_flops

    @property
    def compression(self) -> float:
        """Values of the clip per value of the latents."""
        return _product(self.clip_shape) / self.num_latent_values

    @property
    def num_latent_values(self) -> int:
        """Numbers that are kept of a clip."""
        return NUM_LATENT_FRAMES * _product(self.latent_shape)

    @property
    def bits_per_pixel(self) -> float:
        """Bits of latent per pixel and frame, at 16 bits a value."""
        return 16 * self.num_latent_values / _product(self.clip_shape[1:])


def account(
    config: ModelConfig,
    size: tuple[int, int],
    *,
    num_frames: int | None = None,
    precision: Literal["bf16", "fp32"] = "bf16",
    activation_checkpointing: bool = False,
) -> Account:
    """Count the costs of a model for clips of `num_frames` (k+1 by default) and `size` = (height, width) pixels."""
    model, num_frames = _meta_model(config, precision), num_frames or config.num_frames
    clip = torch.empty(1, 3, num_frames, *size, device="meta", dtype=_DTYPE[precision])
    units = _checkpointed_units(model)
    with FlopCounterMode(display=False) as flops, _Saved(model, units) as saved:
        output = _forward(model, clip)
    operations = {name: sum(each.values()) for name, each in flops.get_flop_counts().items()}
    root = type(model).__name__
    del output  # what the backward pass needs lives as long as this
    return Account(
        clip_shape=(3, num_frames, *size),
        latent_shape=(config.latent.channels, size[0] // SPATIAL_COMPRESSION, size[1] // SPATIAL_COMPRESSION),
        parameters={name: _count(part) for name, part in model.named_children()},
        forward_flops={name: operations.get(f"{root}.{name}", 0) for name, _ in model.named_children()},
        recomputed_flops=sum(operations.get(f"{root}.{name}", 0) for name in units) if activation_checkpointing else 0,
        activation_bytes=saved.checkpointed_bytes() if activation_checkpointing else saved.num_bytes(),
        parameter_sizes=tuple(parameter.numel() for parameter in model.parameters()),
    )


@lru_cache(maxsize=256)
def training_flops_per_clip(config: ModelConfig, size: tuple[int, int], num_frames: int | None = None) -> int:
    """Operations that training needs for one clip of `size` = (height, width) pixels: what MFU is measured against.

    What activation checkpointing computes a second time is no progress, and is left out.
    """
    return account(config, size, num_frames=num_frames).num_training_flops


def _meta_model(config: ModelConfig, precision: str) -> nn.Module:
    """The model without storage. Which attention kernel it uses changes no count, and not every kernel runs on meta."""
    attention = config.decoder.attention.model_copy(update={"backend": "sdpa"})
    decoder = config.decoder.model_copy(update={"attention": attention})
    with torch.device("meta"):
        return build_model(config.model_copy(update={"decoder": decoder})).to(_DTYPE[precision])


def _forward(model: nn.Module, clip: Tensor) -> object:
    """One training forward pass of either kind of model."""
    if hasattr(model, "denoise"):
        return model(clip, clip, torch.ones(clip.shape[0], device="meta"))
    return model(clip)


def _checkpointed_units(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that are recomputed as a whole when activation checkpointing is on, by name."""
    owners = [(name, each) for name, each in model.named_modules() if hasattr(each, "activation_checkpointing")]
    return {
        f"{owner_name}.{list_name}.{index}": unit
        for owner_name, owner in owners
        for list_name, units in owner.named_children()
        if isinstance(units, nn.ModuleList)
        for index, unit in enumerate(units)
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _product(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())


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
