"""Cost of a model, counted on the meta device: parameters, floating point operations, activations.

Attention counts as two matrix products over the tokens that see each other: 4 L^2 D operations for L tokens of width D
if each sees all. Its weight matrix counts as kept if the backend keeps it: `eager` does, fused kernels do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.config.embedder import ModelConfig
from regen_dist.config.run import Recomputation
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.models.attention_kernels import BACKENDS
from regen_dist.models.embedder import build_model
from regen_dist.models.sequence_parallel import SimulatedSequenceParallel, share_rows
from regen_dist.models.t2v import token_grid

# Count, on the meta device, of the operations and kept bytes of one forward pass of a model.


class Pass(NamedTuple):
    """One forward pass: operations by part, those that checkpointing does again, and bytes kept for the backward
    pass."""

    forward_flops: dict[str, int]
    recomputed_flops: int
    activation_bytes: int


def count_pass(model: nn.Module, forward: Callable[[], object], activation_checkpointing: Recomputation) -> Pass:
    """Count `forward`, which calls the model once."""
    selective = activation_checkpointing == "selective"
    units = _checkpointed_units(model)
    with FlopCounterMode(display=False) as counter, _SavedTensors(model, units) as saved:
        output = forward()
    flops = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    del output  # alive until here, with the tensors that the backward pass needs
    recomputed = sum(_flops_of(flops, model, name) for name in units) - (saved.attention_flops if selective else 0)
    return Pass(
        forward_flops={name: _flops_of(flops, model, name) for name, _ in model.named_children()},
        recomputed_flops=recomputed if activation_checkpointing else 0,
        activation_bytes=saved.checkpointed_bytes(selective) if activation_checkpointing else saved.num_bytes(),
    )


def _flops_of(flops: dict[str, int], model: nn.Module, name: str) -> int:
    """Return the operations of a part; those of a list are its members', because it is never called itself."""
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


class _SavedTensors(TorchFunctionMode):
    """Counts what autograd keeps for the backward pass, weights apart: each storage once, by the unit that kept it.

    Attributes:
        attended: attention's outputs, by unit, which recomputation (`models/layers.py`) keeps.
        attention_flops: operations of attention, which are not done again where its outputs are kept.
    """

    def __init__(self, model: nn.Module, units: dict[str, nn.Module]) -> None:
        super().__init__()
        self.weights = {_storage(parameter) for parameter in model.parameters()}
        self.units = units
        self.unit = ""  # the one that runs now; "" between units
        self.fused = False
        self.kept: dict[str, dict[int, Tensor]] = {"": {}, **{name: {} for name in units}}
        self.inputs: dict[int, Tensor] = {}
        self.attended: dict[str, dict[int, Tensor]] = {name: {} for name in self.kept}
        self.attention_flops, self.has_weights = 0, False
        self.scope = self._watch()

    def num_bytes(self) -> int:
        """Kept without checkpointing."""
        return _bytes({key: each for kept in self.kept.values() for key, each in kept.items()})

    def checkpointed_bytes(self, selective: bool = False) -> int:
        """Kept with checkpointing: what lies outside the units, their inputs, attention's outputs in them if it is
        selective, and one unit while it is recomputed."""
        kept = {**self.kept[""], **self.inputs}
        for name in self.units if selective else ():
            kept |= self.attended[name]
        again = ({key: each for key, each in self.kept[name].items() if key not in kept} for name in self.units)
        return _bytes(kept) + max(map(_bytes, again), default=0)

    def __enter__(self) -> _SavedTensors:
        super().__enter__()  # type: ignore[no-untyped-call]
        self.scope.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.scope.__exit__(*error)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A fused attention kernel keeps inputs and output; on the meta device it is made of parts that keep more."""
        if function is not F.scaled_dot_product_attention:
            output = function(*args, **(kwargs or {}))
            if function is Tensor.softmax:
                self.has_weights = True
            elif function in _PRODUCTS and self.has_weights:
                self.has_weights = False
                self._attended(output, 2 * output.numel() * args[0].shape[-1])
            return output
        self.fused = True
        output = function(*args, **(kwargs or {}))  # [..., N, L, E], laid out as the kernels do: [..., L, N, E]
        output = output.transpose(-3, -2).contiguous().transpose(-3, -2)
        self.fused = False
        for tensor in (*args, output):
            self._keep(tensor)
        self._attended(output, 4 * output.numel() * args[1].shape[-2])
        return output

    def _attended(self, output: Tensor, flops: int) -> None:
        """Note attention's output and its operations, where it is in a unit."""
        if self.unit:
            self.attended[self.unit][_storage(output)] = output
            self.attention_flops += flops

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


_PRODUCTS = (Tensor.matmul, Tensor.__matmul__, torch.matmul)


def _storage(tensor: Tensor) -> int:
    """Identifies storages; on the meta device all data pointers are zero."""
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


NUM_LATENT_FRAMES = 2  # of a clip: the content latent and the motion latent
Precision = Literal["bf16", "fp32"]
_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FORWARD_AND_BACKWARD = 3  # the backward pass costs two forward passes: gradients of inputs and of weights


@dataclass(frozen=True)
class FlopReport:
    """Costs of one sample, or of the model, by part (of an embedder `encoder`, `conditioning`, `decoder`)."""

    parameters: dict[str, int]
    forward_flops: dict[str, int]
    recomputed_flops: int  # operations done again: by activation checkpointing, or by each rank that shares the sample
    activation_bytes: int  # kept per sample for the backward pass, on each of the ranks that share it
    parameter_sizes: tuple[int, ...]  # elements of each parameter

    unit: ClassVar[str] = "sample"  # name of a sample

    @property
    def num_parameters(self) -> int:
        """Parameters of all parts."""
        return sum(self.parameters.values())

    @property
    def num_forward_flops(self) -> int:
        """Operations of one forward pass of one sample; a multiplication with an addition counts as two."""
        return sum(self.forward_flops.values())

    @property
    def num_training_flops(self) -> int:
        """Operations of one training step for one sample: forward, backward, and what checkpointing computes again."""
        return _FORWARD_AND_BACKWARD * self.num_forward_flops + self.recomputed_flops


@dataclass(frozen=True)
class ClipFlops(FlopReport):
    """Costs of an embedder, for one clip."""

    clip_shape: tuple[int, int, int, int]  # channels, frames, height, width
    latent_shape: tuple[int, int, int]  # channels, rows, columns of each latent frame
    decoded_frames: int  # of the clip's frames those that the decoder is given in training
    latent_frames: int = NUM_LATENT_FRAMES

    unit: ClassVar[str] = "clip"

    @property
    def compression(self) -> float:
        """Values of the clip per value of the latents."""
        return _product(self.clip_shape) / self.num_latent_values

    @property
    def num_latent_values(self) -> int:
        """Numbers that are kept of a clip."""
        return self.latent_frames * _product(self.latent_shape)

    @property
    def bits_per_pixel(self) -> float:
        """Bits of latent per pixel and frame, at 16 bits a value."""
        return 16 * self.num_latent_values / _product(self.clip_shape[1:])


@dataclass(frozen=True)
class RowFlops(FlopReport):
    """Costs of the text-to-video transformer, for one row of clips and its text."""

    latent_shape: tuple[int, int, int, int]  # channels, latent frames, rows, columns
    text_tokens: int

    unit: ClassVar[str] = "row"

    @property
    def num_tokens(self) -> int:
        """Tokens of the latents."""
        _, *latents = self.latent_shape
        return _product(token_grid((latents[0], latents[1], latents[2])))


def count_flops(
    config: ModelConfig,
    size: tuple[int, int],
    *,
    num_frames: int | None = None,
    decoded: int | None = None,
    precision: Precision = "bf16",
    activation_checkpointing: Recomputation = False,
    sequence_parallel: int = 1,
) -> ClipFlops:
    """Count the costs of an embedder for clips of `num_frames` (k+1 by default) and `size` = (height, width) pixels, of
    which `sequence_parallel` ranks share each. REGEN decodes at most `decoded` of the frames
    (`diffusion.train_frames`), all by default; the baseline all."""
    num_frames, regen = num_frames or config.num_frames, config.kind == "regen"
    decoded = min(decoded or num_frames, num_frames) if regen else num_frames
    clip, noisy = (
        torch.empty(1, 3, frames, *size, device="meta", dtype=_DTYPE[precision]) for frames in (num_frames, decoded)
    )
    model = _on_meta(config, precision)
    inputs = (clip, noisy, _ones(1), None, _ones(1, decoded)) if regen else (clip,)
    return ClipFlops(
        **_parameters(model),
        **_count_shared(model, inputs, activation_checkpointing, sequence_parallel)._asdict(),
        clip_shape=(3, num_frames, *size),
        decoded_frames=decoded,
        latent_shape=(config.latent.channels, size[0] // config.encoder.spatial, size[1] // config.encoder.spatial),
        latent_frames=config.latent_frames,
    )


def count_row_flops(
    config: T2VModelConfig,
    frames: int,
    size: tuple[int, int],
    text_tokens: int,
    *,
    precision: Precision = "bf16",
    activation_checkpointing: Recomputation = False,
    sequence_parallel: int = 1,
    given_frames: bool = False,
) -> RowFlops:
    """Count the costs of the text-to-video transformer for one row of clips.

    Args:
        config: config of the model.
        frames: latent frames of the row: two per clip, or 1 for an image.
        size: rows and columns of the latents: the video's sides over 8.
        text_tokens: tokens of the text, padding included.
        precision: precision of the computation.
        activation_checkpointing: the activations of blocks that are recomputed.
        sequence_parallel: ranks that share a row.
        given_frames: true where rows are trained with given frames: each latent frame then has a time of its own.

    Raises:
        DataError: an odd side.
    """
    shape = (config.latent_channels, frames, *size)
    how = precision, activation_checkpointing, sequence_parallel, given_frames
    counted = _count_row(config, shape, text_tokens, *how)
    return RowFlops(
        **_parameters(_on_meta(config, precision)), **counted._asdict(), latent_shape=shape, text_tokens=text_tokens
    )


def row_forward_flops(
    config: T2VModelConfig, frames: int, size: tuple[int, int], text_tokens: int, *, given_frames: bool = False
) -> int:
    """Count the operations of one forward pass of a row as `count_row_flops` does, but faster: from one block."""
    shape = (config.latent_channels, frames, *size)
    flops = _count_blocks(config, 1, shape, text_tokens, given_frames=given_frames).forward_flops
    return sum(flops.values()) + (config.blocks - 1) * flops["blocks"]


@lru_cache(maxsize=256)
def training_flops_per_clip(
    config: ModelConfig, size: tuple[int, int], num_frames: int | None = None, decoded: int | None = None
) -> int:
    """Count the operations that training needs for one clip of `size` = (height, width) pixels: the reference of MFU.

    What activation checkpointing computes a second time is no progress, and is left out. `decoded` as in
    `count_flops`.
    """
    return count_flops(config, size, num_frames=num_frames, decoded=decoded).num_training_flops


def training_flops_per_row(
    config: T2VModelConfig, frames: int, size: tuple[int, int], text_tokens: int, *, given_frames: bool = False
) -> int:
    """Count the same for one row of `frames` latent frames of `size` = (h, w) cells, with `text_tokens` tokens.

    Every operation on text is a matrix product with as many rows or columns as there are tokens, so the count is affine
    in them: it is taken at two lengths for each kind of row, and a new caption length costs nothing.
    """
    one, more = _flops_of_text(config, frames, size, given_frames)
    return _FORWARD_AND_BACKWARD * (one + (text_tokens - 1) * more)


@lru_cache(maxsize=256)
def _flops_of_text(config: T2VModelConfig, frames: int, size: tuple[int, int], given: bool) -> tuple[int, int]:
    """Operations of a forward pass with one text token, and those of each further one."""
    one, two = (row_forward_flops(config, frames, size, tokens, given_frames=given) for tokens in (1, 2))
    return one, two - one


def _count_row(
    config: T2VModelConfig,
    shape: tuple[int, ...],
    text_tokens: int,
    precision: Precision,
    checkpointing: Recomputation,
    sequence_parallel: int,
    given_frames: bool,
) -> Pass:
    """Count a row from a model of one block and one of two: all blocks are alike, so each further block costs what the
    second does, and the meta device is slow."""
    how = precision, checkpointing, sequence_parallel, given_frames
    one, two = (_count_blocks(config, blocks, shape, text_tokens, *how) for blocks in (1, 2))
    more = config.blocks - 1
    return Pass(
        {name: flops + more * (two.forward_flops[name] - flops) for name, flops in one.forward_flops.items()},
        one.recomputed_flops + more * (two.recomputed_flops - one.recomputed_flops),
        one.activation_bytes + more * (two.activation_bytes - one.activation_bytes),
    )


def _count_blocks(
    config: T2VModelConfig,
    blocks: int,
    shape: tuple[int, ...],
    text_tokens: int,
    precision: Precision = "bf16",
    checkpointing: Recomputation = False,
    sequence_parallel: int = 1,
    given_frames: bool = False,
) -> Pass:
    """Count one pass of a row through a model of this many blocks."""
    model = _on_meta(config.model_copy(update={"blocks": blocks}), precision)
    times = _ones(1, shape[1]) if given_frames else _ones(1)
    inputs = _ones(1, *shape), times, _ones(1, text_tokens, config.text_width), _ones(1, text_tokens).bool()
    return _count_shared(model, inputs, checkpointing, sequence_parallel)


def _count_shared(
    model: nn.Module, inputs: tuple[Tensor | None, ...], checkpointing: Recomputation, sequence_parallel: int
) -> Pass:
    """Return the operations of a sample; those that are repeated, by checkpointing and by each of the ranks that share
    the sample; and the bytes that each of these ranks keeps."""
    whole = count_pass(model, lambda: model(*inputs), checkpointing)
    if sequence_parallel == 1:
        return whole
    share_rows(model, SimulatedSequenceParallel(sequence_parallel))
    part = count_pass(model, lambda: model(*inputs), checkpointing)
    needed, done = (_FORWARD_AND_BACKWARD * sum(each.forward_flops.values()) for each in (whole, part))
    again = sequence_parallel * (done + part.recomputed_flops) - needed
    return whole._replace(recomputed_flops=again, activation_bytes=part.activation_bytes)


def _for_meta(config: Any) -> Any:
    """Return the config with a kernel that runs on the meta device and counts alike."""
    if isinstance(config, ModelConfig):
        return config.model_copy(update={"decoder": _for_meta(config.decoder)})
    backend = BACKENDS[config.attention.backend].build.counted_as or config.attention.backend
    return config.model_copy(update={"attention": config.attention.model_copy(update={"backend": backend})})


def _on_meta(config: ModelConfig | T2VModelConfig, precision: Precision) -> nn.Module:
    """Build the model without storage."""
    with torch.device("meta"):
        return build_model(_for_meta(config)).to(_DTYPE[precision])  # type: ignore[no-any-return]


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, device="meta")


def _parameters(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {name: sum(each.numel() for each in part.parameters()) for name, part in model.named_children()},
        "parameter_sizes": tuple(each.numel() for each in model.parameters()),
    }


def _product(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())
