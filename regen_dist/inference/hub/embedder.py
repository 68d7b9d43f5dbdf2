"""Embedder with the interface of a diffusers autoencoder: `from_pretrained`, `encode(video).latent_dist`,
`decode(...).sample`.

Latent frames follow each other: content and motion of the first clip, then those of the next. An image is one latent
frame, its content.

Legend: B videos, T frames, n clips of k + 1 frames, F = 2n latent frames (1 of an image), C latent channels, H x W
pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from regen_dist.config.embedder import DiffusionConfig, ModelConfig
from regen_dist.config.exported import ExportConfig
from regen_dist.errors import DataError
from regen_dist.inference.codec import Codec, Window
from regen_dist.inference.hub.folder import in_trained_precision, refuse_export, write_code
from regen_dist.inference.hub.inlining import own_module
from regen_dist.models.embedder import build_embedder
from regen_dist.models.encoder import Latents

DEFAULT_TILE = 256


class LatentDistribution:
    """Latent distribution [B, C, F, h, w] of the encoder: a mean, and the std of the noise that the decoder was trained
    with (`config.noise_std`)."""

    def __init__(self, mean: Tensor, std: float) -> None:
        self.mean, self.std = mean, std

    def mode(self) -> Tensor:
        """Return the latents without noise."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents with noise; without noise where the decoder was trained without it."""
        if self.std == 0:
            return self.mean
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean)
        return self.mean + self.std * noise


@dataclass
class EncodedVideo(BaseOutput):  # type: ignore[misc]
    """Output of `VideoEmbedder.encode`."""

    latent_dist: LatentDistribution


@dataclass
class DecodedVideo(BaseOutput):  # type: ignore[misc]
    """Output of `VideoEmbedder.decode`: `sample` [B, 3, T, H, W] in [-1, 1]."""

    sample: Tensor


class VideoEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A trained embedder for inference. Computes in the dtype of its weights, which is that of training unless
    `torch_dtype` is given.

    Args:
        model: the `ModelConfig`, as plain values.
        diffusion: the `DiffusionConfig`, as plain values.
        precision: precision of training, `bf16` or `fp32`.
        latents_mean, latents_std: [C] for content and [C] for motion latents; None where they were not measured.
        scaling_factor: one over the std of all latents together; 1 where it was not measured.
        noise_std: std of the noise on latents in the decoder's training.
        auto_map: module and name under which diffusers finds this class.
    """

    _supports_gradient_checkpointing = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        model: dict[str, Any],
        diffusion: dict[str, Any],
        precision: str = "bf16",
        latents_mean: list[list[float]] | None = None,
        latents_std: list[list[float]] | None = None,
        scaling_factor: float = 1.0,
        noise_std: float = 0.0,
        auto_map: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        exported = ExportConfig(
            model=ModelConfig(**model),
            diffusion=DiffusionConfig(**diffusion),
            precision=precision,  # type: ignore[arg-type]
        )
        inner = build_embedder(exported.model)
        for name, part in inner.named_children():  # under the names that their weights have in an export
            self.add_module(name, part)
        self.__dict__["_exported"], self.__dict__["_inner"] = exported, inner
        self.use_slicing = False
        self.tile: int | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Any:
        """Load an exported folder or a repository on the hub; options as in diffusers' `ModelMixin`."""
        return super().from_pretrained(path, **in_trained_precision(cls, path, options))

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """Write the config and, beside it, the module of code that opens the model; raise CheckpointError if the
        folder holds an exported model."""
        refuse_export(save_directory)
        self.register_to_config(auto_map=write_code(save_directory, own_module(), type(self).__name__))
        super().save_config(save_directory, push_to_hub=push_to_hub, **options)

    @property
    def num_frames(self) -> int:
        return self._exported.model.num_frames  # type: ignore[no-any-return]

    @property
    def latent_channels(self) -> int:
        return self._exported.model.latent.channels  # type: ignore[no-any-return]

    def enable_tiling(self, side: int = DEFAULT_TILE) -> None:
        """Process tiles with sides of this many pixels, which bounds the memory; the result is that of whole frames.

        Raises:
            ConfigError: the decoder attends over whole frames, or the side is below 64.
        """
        self._codec().use_tiles(side)
        self.tile = side

    def disable_tiling(self) -> None:
        """Process whole frames again."""
        self.tile = None

    def enable_slicing(self) -> None:
        """Encode one clip at a time. (Decoding always does.)"""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode all clips at once again."""
        self.use_slicing = False

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, x: Tensor, return_dict: bool = True) -> EncodedVideo | tuple[LatentDistribution]:
        """Encode videos [B, 3, T, H, W] in [-1, 1], sides multiples of 8, to latent frames [B, C, F, h, w].

        One frame is an image. Longer videos are cut into adjacent clips; the last is padded with its last frame.

        Raises:
            DataError: the shape does not fit.
        """
        if x.ndim != 5 or not x.shape[2]:
            raise DataError(f"videos have the shape [batch, 3, frames, height, width], found {list(x.shape)}")
        codec, clips = self._codec(), _clips(x, self.num_frames)  # [B*n, 3, k+1, H, W]
        parts = [codec.encode(part) for part in clips.split(1 if self.use_slicing else len(clips))]
        content, motion = (torch.cat(each) for each in zip(*parts, strict=True))
        frames = torch.stack([content, motion], 2) if x.shape[2] > 1 else content.unsqueeze(2)  # [B*n, C, 1 or 2, h, w]
        rows = frames.unflatten(0, (len(x), -1)).transpose(1, 2).flatten(2, 3)  # [B, C, F, h, w]
        found = LatentDistribution(rows, self.config.noise_std)
        return EncodedVideo(latent_dist=found) if return_dict else (found,)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(
        self,
        z: Tensor,
        num_frames: int | None = None,
        times: Tensor | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        sample_ids: Sequence[int] | None = None,
        start: float = 0.0,
        return_dict: bool = True,
    ) -> DecodedVideo | tuple[Tensor]:
        """Decode latent frames [B, C, F, h, w] to videos [B, 3, T, H, W] in [-1, 1], float32.

        Args:
            z: latents as `encode` returns them, not scaled.
            num_frames: T, the number of frames to decode from the first one on, in whole clips; all by default.
            times: [T] real numbers, instead of `num_frames`: in frames from the video's first, where clip i begins at
                i (k + 1). Times between frames and slightly past the last are allowed.
            num_inference_steps: sampling steps of the decoder; as in training by default.
            seed, sample_ids, start: keys of the decoder's noise: the number of each video (its place in the batch by
                default), and the time of each frame, where `start` is the time of the first.

        Raises:
            DataError: the latent frames are neither of an image nor of a row of clips, or hold fewer frames.
            ConfigError: times between frames were requested from the convolutional baseline.
        """
        if z.ndim != 5 or z.shape[1] != self.latent_channels or (z.shape[2] != 1 and z.shape[2] % 2):
            raise DataError(
                f"latents have the shape [batch, {self.latent_channels}, frames, h, w], with one latent frame or two "
                f"for each clip, found {list(z.shape)}"
            )
        if times is None:
            held = 1 if z.shape[2] == 1 else z.shape[2] // 2 * self.num_frames
            if not 1 <= (held if num_frames is None else num_frames) <= held:
                raise DataError(f"these latents hold {held} frames, asked for {num_frames}; give times beyond them")
            clips = -(-(num_frames or held) // self.num_frames)  # those that hold the requested frames
            times = torch.arange(min(held, clips * self.num_frames))
        else:
            num_frames = None
        default = 1 if self._exported.model.kind == "magvit2" else self._exported.diffusion.steps
        codec, steps = self._codec(), num_inference_steps or default
        videos = []
        for number, row in zip(range(len(z)) if sample_ids is None else sample_ids, z.split(1), strict=True):
            windows, at = list(_windows(row, self.num_frames, start)), times.double() + start
            videos.append(codec.decode_windows(windows, at, steps=steps, seed=seed, sample_id=number))
        sample = torch.cat(videos)[:, :, :num_frames]
        return DecodedVideo(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True) -> Any:
        found = self.encode(sample).latent_dist
        latents = found.sample() if sample_posterior else found.mode()
        return self.decode(latents, num_frames=sample.shape[2], return_dict=return_dict)

    def _codec(self) -> Codec:
        codec = Codec(self._inner, self._exported, self.device, dtype=self.dtype)
        codec.tile = self.tile
        return codec


def _clips(videos: Tensor, length: int) -> Tensor:
    """Cut videos [B, 3, T, H, W] into adjacent clips [B*n, 3, length, H, W]; an image stays as it is."""
    if videos.shape[2] == 1:
        return videos
    missing = -videos.shape[2] % length
    if missing:
        videos = torch.cat([videos, videos[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)
    return videos.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)  # type: ignore[no-any-return]


def _windows(row: Tensor, length: int, start: float) -> Iterator[Window]:
    """Split one video's latent frames [1, C, F, h, w] into its clips, adjacent from `start` on."""
    if row.shape[2] == 1:
        yield Window(Latents(row[:, :, 0], torch.zeros_like(row[:, :, 0])), start, 1)
    for clip in range(row.shape[2] // 2):
        content, motion = row[:, :, 2 * clip], row[:, :, 2 * clip + 1]
        yield Window(Latents(content, motion), start + clip * length, length)
