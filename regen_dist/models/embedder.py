"""The two video embedders: REGEN, and the MAGVIT-v2 style baseline that it is compared with.

Legend: B batch, T frames, H x W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.embedder import ModelConfig
from regen_dist.config.run import SPATIAL_COMPRESSION as P
from regen_dist.config.run import Recomputation
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.models.conditioning import FrameConditioning, InContextConditioning, LatentConditioning
from regen_dist.models.decoder import GenerativeDecoder
from regen_dist.models.diffusers_encoder import DiffusersEncoder
from regen_dist.models.encoder import Encoder, Latents
from regen_dist.models.layers import (
    CausalConv,
    CausalUpsample,
    ChannelNorm,
    Checkpointed,
    Frames,
    ResidualBlock,
    ZeroConv,
    join_first,
    recompute_activations,
    unfold_patches,
)
from regen_dist.models.linear import LinearDecoder
from regen_dist.models.t2v import TextToVideo


def build_encoder(config: ModelConfig) -> Encoder | DiffusersEncoder:
    """Build the encoder that a config describes: with fresh weights, or a third-party one."""
    return DiffusersEncoder(config) if config.encoder.frozen else Encoder(config)


class EmbedderBase(nn.Module):
    """Common base of the two embedders: the encoder and the shape of its latents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder: Encoder | DiffusersEncoder = build_encoder(config)

    def encode(self, video: Tensor) -> Latents:
        """Clips [B, 3, k+1, H, W] (or images, one frame) in [-1, 1] to latents [B, 8, h, w].

        Raises:
            DataError: the number of frames or the sides do not fit.
        """
        return self.encoder(video)  # type: ignore[no-any-return]

    def frame_times(self, video: Tensor) -> Tensor:
        """The times [B, T] of a video's own frames: 0, 1, 2, ..."""
        times = torch.arange(video.shape[2], device=video.device, dtype=torch.float32)
        return times.expand(video.shape[0], -1)

    def set_activation_checkpointing(self, enabled: Recomputation) -> None:
        """Recompute activations in the backward pass instead of keeping them; "selective": all but attention's."""
        recompute_activations(self, enabled)


class Regen(EmbedderBase):
    """Encoder, latent conditioning and generative decoder (paper, Fig. 2), trained end to end.

    Its variants for ablations: `model.conditioning` and `model.decoder` of the config.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.in_context = config.conditioning.kind == "in_context"
        self.conditioning: nn.Module
        if config.encoder.frozen:
            self.conditioning = FrameConditioning(config)
        else:
            self.conditioning = InContextConditioning(config) if self.in_context else LatentConditioning(config)
        self.decoder = GenerativeDecoder(config.decoder)
        self.linear = LinearDecoder(config) if config.decoder.linear and not config.encoder.frozen else None

    def denoise(self, noisy: Tensor, t: Tensor, latents: Latents, times: Tensor) -> Tensor:
        """Predict once with the decoder.

        Args:
            noisy: [B, 3, T, H, W].
            t: diffusion time [B] in (0, 1].
            latents: latents of the clips.
            times: [B, T] real, in frames from each clip's first.

        Returns:
            The prediction target (x0, velocity or noise, as trained), [B, 3, T, H, W] in float32.
        """
        linear = None if self.linear is None else self.linear(*latents, times)
        grid = (noisy.shape[2], noisy.shape[3] // P, noisy.shape[4] // P)
        conditioning = self.conditioning(latents, times if self.in_context else times[:, self.decoder.own_frames(grid)])
        decoded: Tensor = (
            self.decoder(noisy, t, *conditioning) if self.in_context else self.decoder(noisy, t, conditioning)
        )
        return decoded if linear is None else linear + decoded

    def forward(
        self,
        video: Tensor,
        noisy: Tensor,
        t: Tensor,
        latent_noise: Latents | None = None,
        times: Tensor | None = None,
    ) -> tuple[Tensor, Latents]:
        """Encode `video` and predict from `noisy`: one call for all that a training step needs. `noisy` are the frames
        at `times` [B, T]; the video's own by default. Returns the clean latents too."""
        latents = self.encode(video)
        seen = latents if latent_noise is None else _perturb(latents, latent_noise)
        return self.denoise(noisy, t, seen, self.frame_times(video) if times is None else times), latents


class Baseline(EmbedderBase):
    """MAGVIT-v2 style autoencoder with continuous latents: same encoder, same latent budget, a mirrored causal
    convolutional decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.decoder = ConvDecoder(config)

    def reconstruct(self, latents: Latents, num_frames: int) -> Tensor:
        """Latents to a clip [B, 3, T, H, W] in float32; `num_frames` is k+1, or 1 for an image."""
        return self.decoder(latents, num_frames)  # type: ignore[no-any-return]

    def forward(self, video: Tensor, latent_noise: Latents | None = None) -> tuple[Tensor, Latents]:
        """Encode and reconstruct `video`. Returns the clean latents too."""
        latents = self.encode(video)
        seen = latents if latent_noise is None else _perturb(latents, latent_noise)
        return self.reconstruct(seen, video.shape[2]), latents


def _perturb(latents: Latents, noise: Latents) -> Latents:
    """Latents plus noise; the motion latent of an image stays zero."""
    content, motion = (latent + eps.to(latent.dtype) for latent, eps in zip(latents, noise, strict=True))
    is_clip = (latents.motion != 0).any(1, keepdim=True)
    return Latents(content, torch.where(is_clip, motion, latents.motion))


# The baseline's decoder: the encoder's stages mirrored, causal, from two latent frames to a clip (after MAGVIT-v2,
# continuous latents).
#
# Legend: B batch, T frames, h x w latent cells, H = 8h, W = 8w.


class ConvDecoder(Checkpointed):
    """Latents [B, 8, h, w] to pixels [B, 3, T, H, W]; the motion latent is a second latent frame."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.encoder.stem_patch
        channels = config.encoder.stages[-1].channels
        self.stem = CausalConv(config.latent.channels, channels)
        layers: list[nn.Module] = [ResidualBlock(channels, channels) for _ in range(config.encoder.out_blocks)]
        for stage in reversed(config.encoder.stages):
            if stage.spatial * stage.temporal > 1:
                layers.append(CausalUpsample(channels, stage.channels, stage.spatial, stage.temporal))
                channels = stage.channels
            for _ in range(stage.blocks):
                layers.append(ResidualBlock(channels, stage.channels))
                channels = stage.channels
        self.layers = nn.ModuleList(layers)
        self.norm = ChannelNorm(channels)
        self.head = ZeroConv(channels, 3 * self.patch**2)
        self.linear = LinearDecoder(config) if config.decoder.linear else None

    def forward(self, latents: Latents, num_frames: int) -> Tensor:
        motion = latents.motion.unsqueeze(2) if num_frames > 1 else None
        frames = self.stem(Frames(latents.content, motion))
        for layer in self.layers:
            frames = self.run(layer, frames)
        frames = self.head(self.norm(frames).map(F.silu))
        decoded = join_first(unfold_patches(frames, self.patch)).float()
        if self.linear is None:
            return decoded
        times = torch.arange(num_frames, device=latents.content.device, dtype=torch.float32)
        return decoded + self.linear(*latents, times.expand(len(latents.content), -1))  # type: ignore[no-any-return]


# Construction of the model that a config describes.


@overload
def build_model(config: ModelConfig) -> Regen | Baseline: ...


@overload
def build_model(config: T2VModelConfig) -> TextToVideo: ...


def build_model(config: ModelConfig | T2VModelConfig) -> Regen | Baseline | TextToVideo:
    """The embedder or the text-to-video transformer that a config describes, with fresh weights."""
    if isinstance(config, T2VModelConfig):
        return TextToVideo(config)
    return build_embedder(config)


def build_embedder(config: ModelConfig) -> Regen | Baseline:
    """The embedder that a config describes, with fresh weights."""
    return Regen(config) if config.kind == "regen" else Baseline(config)
