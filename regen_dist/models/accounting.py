"""What a model costs, counted on the meta device: parameters, floating point operations, activations.

Attention counts as two matrix products over the tokens that see each other, 4 L^2 D operations for L tokens of width D
that all do. Its matrix of weights is counted as kept where the backend keeps it: `eager` does, fused kernels do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn as nn
from torch import Tensor

from regen_dist.config.schema import SPATIAL_COMPRESSION, ModelConfig
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.models.building import build_model
from regen_dist.models.counting import Pass, count_pass
from regen_dist.models.sequence import PretendedRows, share_rows
from regen_dist.models.t2v import token_grid

NUM_LATENT_FRAMES = 2  # of a clip: the content latent and the motion latent
Precision = Literal["bf16", "fp32"]
_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FORWARD_AND_BACKWARD = 3  # the backward pass costs two forward passes: gradients of inputs and of weights


@dataclass(frozen=True)
class Account:
    """Costs of one sample, or of the model, by part (of an embedder `encoder`, `conditioning`, `decoder`)."""

    parameters: dict[str, int]
    forward_flops: dict[str, int]
    recomputed_flops: int  # operations done again: by activation checkpointing, or by each rank that shares the sample
    activation_bytes: int  # kept per sample for the backward pass, on each of the ranks that share it
    parameter_sizes: tuple[int, ...]  # elements of each parameter

    unit: ClassVar[str] = "sample"  # what one is called

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
class ClipAccount(Account):
    """An embedder's, for one clip."""

    clip_shape: tuple[int, int, int, int]  # channels, frames, height, width
    latent_shape: tuple[int, int, int]  # channels, rows, columns of each of the two latent frames

    unit: ClassVar[str] = "clip"

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


@dataclass(frozen=True)
class RowAccount(Account):
    """The text-to-video transformer's, for one row of clips and its text."""

    latent_shape: tuple[int, int, int, int]  # channels, latent frames, rows, columns
    text_tokens: int

    unit: ClassVar[str] = "row"

    @property
    def num_tokens(self) -> int:
        """Tokens of the latents."""
        _, *latents = self.latent_shape
        return _product(token_grid((latents[0], latents[1], latents[2])))


def account(
    config: ModelConfig,
    size: tuple[int, int],
    *,
    num_frames: int | None = None,
    precision: Precision = "bf16",
    activation_checkpointing: bool = False,
    sequence_parallel: int = 1,
) -> ClipAccount:
    """Count the costs of an embedder for clips of `num_frames` (k+1 by default) and `size` = (height, width) pixels, of
    which `sequence_parallel` ranks share each."""
    num_frames = num_frames or config.num_frames
    clip = torch.empty(1, 3, num_frames, *size, device="meta", dtype=_DTYPE[precision])
    model = _on_meta(config, precision)
    inputs = (clip, clip, _ones(1)) if config.kind == "regen" else (clip,)
    return ClipAccount(
        **_parameters(model),
        **_count_shared(model, inputs, activation_checkpointing, sequence_parallel)._asdict(),
        clip_shape=(3, num_frames, *size),
        latent_shape=(config.latent.channels, size[0] // SPATIAL_COMPRESSION, size[1] // SPATIAL_COMPRESSION),
    )


def account_row(
    config: T2VModelConfig,
    frames: int,
    size: tuple[int, int],
    text_tokens: int,
    *,
    precision: Precision = "bf16",
    activation_checkpointing: bool = False,
    sequence_parallel: int = 1,
) -> RowAccount:
    """Count the costs of the text-to-video transformer for one row of clips.

    Args:
        config: of the model.
        frames: latent frames of the row: two per clip, or 1 for an image.
        size: rows and columns of the latents: the video's sides over 8.
        text_tokens: of the text, padding included.
        precision: that it computes in.
        activation_checkpointing: whether blocks are recomputed.
        sequence_parallel: ranks that share a row.

    Raises:
        DataError: an odd side.
    """
    shape = (config.latent_channels, frames, *size)
    counted = _count_row(config, shape, text_tokens, precision, activation_checkpointing, sequence_parallel)
    return RowAccount(
        **_parameters(_on_meta(config, precision)), **counted._asdict(), latent_shape=shape, text_tokens=text_tokens
    )


def row_forward_flops(config: T2VModelConfig, frames: int, size: tuple[int, int], text_tokens: int) -> int:
    """Operations of one forward pass of a row, as `account_row` counts them, sooner: of one block."""
    flops = _count_blocks(config, 1, (config.latent_channels, frames, *size), text_tokens).forward_flops
    return sum(flops.values()) + (config.blocks - 1) * flops["blocks"]


@lru_cache(maxsize=256)
def training_flops_per_clip(
    config: ModelConfig, size: tuple[int, int], num_frames: int | None = None, decoded: int | None = None
) -> int:
    """Operations that training needs for one clip of `size` = (height, width) pixels: what MFU is measured against.

    What activation checkpointing computes a second time is no progress, and is left out. Where only `decoded` of the
    frames are, all but the encoder counts by that share (attention a little too high).
    """
    counted = account(config, size, num_frames=num_frames)
    if decoded is None or decoded == counted.clip_shape[1]:
        return counted.num_training_flops
    encoder = counted.forward_flops["encoder"]
    rest = (counted.num_forward_flops - encoder) * decoded // counted.clip_shape[1]
    return _FORWARD_AND_BACKWARD * (encoder + rest)


def training_flops_per_row(config: T2VModelConfig, frames: int, size: tuple[int, int], text_tokens: int) -> int:
    """The same for one row of `frames` latent frames of `size` = (h, w) cells, with so many text tokens.

    Every operation on text is a matrix product with as many rows or columns as there are tokens, so the count is affine
    in them: it is taken at two lengths for each kind of row, and a new caption length costs nothing.
    """
    one, more = _flops_of_text(config, frames, size)
    return _FORWARD_AND_BACKWARD * (one + (text_tokens - 1) * more)


@lru_cache(maxsize=256)
def _flops_of_text(config: T2VModelConfig, frames: int, size: tuple[int, int]) -> tuple[int, int]:
    """Operations of a forward pass with one text token, and those of each further one."""
    one, two = (row_forward_flops(config, frames, size, tokens) for tokens in (1, 2))
    return one, two - one


def _count_row(
    config: T2VModelConfig,
    shape: tuple[int, ...],
    text_tokens: int,
    precision: Precision,
    checkpointing: bool,
    sequence_parallel: int,
) -> Pass:
    """All blocks are alike, and the meta device is slow: a model of one block and one of two are counted, and each
    further block costs what the second does."""
    how = precision, checkpointing, sequence_parallel
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
    checkpointing: bool = False,
    sequence_parallel: int = 1,
) -> Pass:
    """One pass of a row through a model of so many blocks."""
    model = _on_meta(config.model_copy(update={"blocks": blocks}), precision)
    inputs = _ones(1, *shape), _ones(1), _ones(1, text_tokens, config.text_width), _ones(1, text_tokens).bool()
    return _count_shared(model, inputs, checkpointing, sequence_parallel)


def _count_shared(model: nn.Module, inputs: tuple[Tensor, ...], checkpointing: bool, sequence_parallel: int) -> Pass:
    """Operations of a sample; what is done again, by checkpointing and by ranks that share it and do the same beside
    each other; and what each of these keeps."""
    whole = count_pass(model, lambda: model(*inputs), checkpointing)
    if sequence_parallel == 1:
        return whole
    share_rows(model, PretendedRows(sequence_parallel))
    part = count_pass(model, lambda: model(*inputs), checkpointing)
    needed, done = (_FORWARD_AND_BACKWARD * sum(each.forward_flops.values()) for each in (whole, part))
    again = sequence_parallel * (done + part.recomputed_flops) - needed
    return whole._replace(recomputed_flops=again, activation_bytes=part.activation_bytes)


def _for_meta(config: Any) -> Any:
    """The config with a kernel that runs on the meta device: of the fused ones it is PyTorch's, and they count
    alike."""
    if isinstance(config, ModelConfig):
        return config.model_copy(update={"decoder": _for_meta(config.decoder)})
    backend = "sdpa" if config.attention.backend == "flash" else config.attention.backend
    return config.model_copy(update={"attention": config.attention.model_copy(update={"backend": backend})})


def _on_meta(config: ModelConfig | T2VModelConfig, precision: Precision) -> nn.Module:
    """The model without storage."""
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
