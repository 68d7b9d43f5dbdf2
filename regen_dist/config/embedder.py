"""The typed, frozen config of an embedder's run, one class a section; `config/t2v.py` has that of text to video.

Imports neither torch nor the library, so that a launcher can validate a config on a login node.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from regen_dist.config.datasets import DataConfig, MixtureConfig, ReadConfig, SourceConfig
from regen_dist.config.losses import SSIM_WINDOW, LossesConfig
from regen_dist.config.run import (
    SPATIAL_COMPRESSION,
    CheckpointConfig,
    CommonConfig,
    EngineConfig,
    Fraction,
    GuardsConfig,
    HangConfig,
    LatentStdConfig,
    NonNegativeFloat,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    SamplerName,
    Section,
    SpikeConfig,
    TrainConfig,
    WandbConfig,
)
from regen_dist.errors import ConfigError

__all__ = [
    "SPATIAL_COMPRESSION", "AttentionConfig", "CheckpointConfig", "CommonConfig", "ConditioningConfig", "DataConfig",
    "DecoderConfig", "DensityConfig", "DiffusionConfig", "EmbedderConfig", "EncoderConfig", "EngineConfig",
    "GuardsConfig", "HangConfig", "LatentConfig", "LatentStdConfig", "MixtureConfig", "ModelConfig", "OptimizerConfig",
    "ReadConfig", "SourceConfig", "SpikeConfig", "StageConfig", "TrainConfig", "WandbConfig",
]  # fmt: skip

_OF_DIFFUSERS = ("path", "cell", "stride", "precision")
TemporalCompression = Literal[4, 8, 16, 32]


class StageConfig(Section):
    """One resolution level of the causal encoder: residual blocks, then a strided causal convolution."""

    channels: PositiveInt = Field(description="Channels of the stage.")
    blocks: PositiveInt = Field(default=1, description="Residual blocks of the stage.")
    spatial: Literal[1, 2] = Field(
        default=1,
        description="Spatial stride at the stage's end; these and `stem_patch` multiply to 8 (paper: 8x spatial).",
    )
    temporal: Literal[1, 2] = Field(
        default=1, description="Temporal stride at the stage's end; these multiply to `model.temporal_compression`."
    )


class EncoderConfig(Section):
    """The encoder: `causal`, our 3D-convolutional one, which is trained; or `diffusers`, that of somebody else's video
    autoencoder, which is not. Fields of the other kind are ignored, and not saved."""

    kind: Literal["causal", "diffusers"] = Field(
        default="causal",
        description="causal: our 3D convolutions, trained (paper); diffusers: a pretrained video autoencoder's, "
        "frozen.",
    )
    stem_patch: Literal[1, 2, 4] = Field(
        default=1,
        description="Causal: pixels a side folded into channels before the first convolution; 1: none, 4 saves time.",
    )
    stages: tuple[StageConfig, ...] = Field(default=(), description="Causal: resolution levels in order, at least one.")
    out_blocks: PositiveInt = Field(default=1, description="Causal: residual blocks after the last stage.")
    path: str | None = Field(
        default=None, description="Diffusers, required: folder that diffusers has saved the autoencoder in."
    )
    cell: Literal[8, 16, 32] = Field(
        default=8, description="Diffusers: pixels a side per latent cell; must be what the autoencoder does."
    )
    stride: Literal[1, 2, 4, 8] = Field(
        default=4, description="Diffusers: frames per latent frame; must be what the autoencoder does."
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Diffusers: precision that the encoder works in."
    )

    @property
    def frozen(self) -> bool:
        """Return true for a pretrained autoencoder of diffusers, which is not trained."""
        return self.kind == "diffusers"

    @property
    def spatial(self) -> int:
        """Return the spatial compression: pixels a side per latent cell."""
        return self.cell if self.frozen else self.stem_patch * prod(stage.spatial for stage in self.stages)

    @property
    def temporal(self) -> int:
        """Return the temporal compression: frames after the first that the motion, or each, latent frame encodes."""
        return self.stride if self.frozen else prod(stage.temporal for stage in self.stages)

    def autoencoder_config(self) -> Path:
        """Return the `config.json` of the diffusers autoencoder in the folder `path`, or in `vae/` of a pipeline's.

        Raises:
            ConfigError: there is none.
        """
        folder = Path(os.path.expanduser(self.path or ""))
        for found in (folder / "vae" / "config.json", folder / "config.json"):
            if found.is_file():
                return found
        raise ConfigError(
            f"model.encoder.path {self.path}: no config.json there; give the folder of an autoencoder that "
            "diffusers has saved, or of a pipeline with vae/ in it (of the hub: `hf download` it first)"
        )

    @model_validator(mode="after")
    def _check_kind(self) -> EncoderConfig:
        if self.frozen and not self.path:
            raise ValueError("kind 'diffusers' needs path: the folder of an autoencoder that diffusers has saved")
        if not self.frozen and not self.stages:
            raise ValueError("stages is required and not set: kind 'causal' needs at least one")
        return self

    @model_serializer(mode="wrap")
    def _own_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise the fields of this kind only. A causal encoder is saved as before other kinds existed, so that
        hashes and fingerprints stay."""
        others = ("stem_patch", "stages", "out_blocks") if self.frozen else (*_OF_DIFFUSERS, "kind")
        return {name: value for name, value in handler(self).items() if name not in others}


class LatentConfig(Section):
    """Latents, which lie in a ball by construction (`encoder.bound_latent`)."""

    channels: PositiveInt = Field(default=8, description="Channels of each latent frame (paper: 8).")
    noise_std: NonNegativeFloat = Field(
        default=0.0,
        description="Std of Gaussian noise added to latents in training, for robust decoders; 0: none.",
    )


class ConditioningConfig(Section):
    """Conditioning of the decoder on the latents: by a function of time that the motion latent modulates, or by tokens
    in front of the pixels', which take none of the other settings (paper: Fig. 3 and the conditioning ablation)."""

    kind: Literal["content_aware", "in_context"] = Field(
        default="content_aware",
        description="content_aware: a function of time joined with the content (paper, Fig. 3); in_context: latents as "
        "tokens, its rival.",
    )
    time: Literal["siren", "learned"] = Field(
        default="siren",
        description="Function of time: siren takes any real time (paper); learned: one vector for each frame.",
    )
    width: PositiveInt = Field(default=256, description="Width of the layers that the motion latent modulates.")
    layers: PositiveInt = Field(default=3, description="Number of layers that the motion latent modulates.")
    omega: PositiveFloat = Field(
        default=10.0, description="Frequency of the SIREN's first layer: sin(omega (W t/k + b)), t in frames."
    )
    first_frame_rule: bool = Field(
        default=True,
        description="The first frame does not depend on the motion latent, so that images and videos are conditioned "
        "alike (paper, Fig. 3).",
    )


class AttentionConfig(Section):
    """Self-attention: the kernel (`backend`) and the attention pattern (`pattern`)."""

    backend: Literal["sdpa", "eager", "flash", "reference"] = Field(
        default="sdpa",
        description="Kernel. eager can be faster on CPUs for small windows; flash needs CUDA; reference is for tests.",
    )
    pattern: Literal["full", "window"] = Field(
        default="full",
        description="full: every token sees all (paper); window: those of its box, at a cost linear in the video.",
    )
    window: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        default=(9, 8, 8), description="Tokens of a box of pattern window: (frames, rows, columns)."
    )


class DecoderConfig(Section):
    """Pixel-space diffusion transformer of patch 8 (paper). The baseline takes only `linear` from it."""

    blocks: PositiveInt = Field(default=24, description="Transformer blocks (paper: 24).")
    heads: PositiveInt = Field(default=16, description="Attention heads; must divide `width` (paper: 16).")
    width: PositiveInt = Field(default=2048, description="Channels of a token (paper: 2048).")
    mlp_ratio: PositiveFloat = Field(default=4.0, description="Hidden width of the feed-forward layers over `width`.")
    attention: AttentionConfig = Field(default=AttentionConfig(), description="Self-attention.")
    local: bool = Field(
        default=True,
        description="Depthwise 3x3 convolution in every block (ours, +0.4 to +0.6 dB in short runs; the paper has "
        "none).",
    )
    linear: bool = Field(
        default=True, description="Linear code beside the decoder, the baseline's too (ours); false: the decoder alone."
    )

    @model_validator(mode="after")
    def _check_heads(self) -> DecoderConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; choose a width that is")
        return self


class ModelConfig(Section):
    """The embedder: `regen` (diffusion transformer decoder) or `magvit2` (the mirrored causal convolutional
    baseline)."""

    kind: Literal["regen", "magvit2"] = Field(
        default="regen",
        description="regen: diffusion transformer decoder; magvit2: the mirrored causal convolutional baseline.",
    )
    temporal_compression: TemporalCompression = Field(
        default=8, description="k: a clip of k + 1 frames becomes two latent frames (paper: 4, 8, 16 and 32)."
    )
    encoder: EncoderConfig = Field(description="Encoder of clips to latents.")
    latent: LatentConfig = Field(default=LatentConfig(), description="Latents between encoder and decoder.")
    conditioning: ConditioningConfig = Field(
        default=ConditioningConfig(), description="Conditioning of the decoder on the latents."
    )
    decoder: DecoderConfig = Field(default=DecoderConfig(), description="Decoder; magvit2 takes only `linear` from it.")
    linear_start: Literal["dct", "pca", "random"] = Field(
        default="dct",
        description="Start of the linear code: dct (for x0 predictions), pca fitted to the first clips, or random (for "
        "other targets).",
    )

    @property
    def num_frames(self) -> int:
        """Return the frames of a full clip: k + 1."""
        return self.temporal_compression + 1

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip: content and motion, or those of somebody else's encoder."""
        return 1 + self.temporal_compression // self.encoder.temporal if self.encoder.frozen else 2

    @model_validator(mode="after")
    def _check_frozen_encoder(self) -> ModelConfig:
        if not self.encoder.frozen:
            return self
        wanted = {
            "kind": (self.kind, "regen"), "conditioning.kind": (self.conditioning.kind, "content_aware"),
            "conditioning.time": (self.conditioning.time, "siren"), "latent.noise_std": (self.latent.noise_std, 0.0),
        }  # fmt: skip
        wrong = [f"{name} must be {must!r}, found {found!r}" for name, (found, must) in wanted.items() if found != must]
        if self.linear_start == "pca":
            wrong.append("linear_start must not be 'pca', which fits an encoder")
        if self.temporal_compression % self.encoder.stride:
            wrong.append(
                f"temporal_compression {self.temporal_compression} must be a multiple of encoder.stride "
                f"{self.encoder.stride}"
            )
        if wrong:
            raise ValueError(f"encoder.kind 'diffusers': {'; '.join(wrong)}")
        return self

    @model_validator(mode="after")
    def _check_strides(self) -> ModelConfig:
        if self.encoder.frozen:
            return self
        if self.encoder.spatial != SPATIAL_COMPRESSION:
            raise ValueError(
                f"encoder.stem_patch and the spatial strides of encoder.stages multiply to {self.encoder.spatial}; "
                f"they must multiply to {SPATIAL_COMPRESSION}"
            )
        if self.encoder.temporal != self.temporal_compression:
            raise ValueError(
                f"the temporal strides of encoder.stages multiply to {self.encoder.temporal}; "
                f"they must multiply to temporal_compression = {self.temporal_compression}"
            )
        return self

    @model_validator(mode="after")
    def _check_attention_pattern(self) -> ModelConfig:
        pattern = self.decoder.attention.pattern
        if self.kind == "regen" and self.conditioning.kind == "in_context" and pattern != "full":
            raise ValueError(
                f"conditioning.kind 'in_context' needs decoder.attention.pattern 'full', found {pattern!r}: windows "
                "are cut from the grid of pixel tokens, where latent tokens have no place; set "
                "model.decoder.attention.pattern=full, or model.conditioning.kind=content_aware"
            )
        return self


class DensityConfig(Section):
    """Density of the training timesteps in (0, 1]; 1 is pure noise."""

    kind: Literal["uniform", "logit_normal"] = Field(
        default="logit_normal", description="Density of the timesteps, before the shift."
    )
    mean: float = Field(default=0.0, description="Mean of the logit of logit_normal; above 0 is noisier.")
    std: PositiveFloat = Field(default=1.0, description="Std of the logit of logit_normal.")
    shift: PositiveFloat = Field(default=1.0, description="Moves timesteps towards noise; 1: not at all.")
    pure_noise: Fraction = Field(
        default=0.5, description="Share of the samples at exactly 1, where a one-step reconstruction starts."
    )


class DiffusionConfig(Section):
    """Noise path, prediction target, timestep density, loss weighting, and the sampler used by default."""

    path: Literal["rectified_flow", "cosine_vp"] = Field(
        default="rectified_flow", description="Way between clip and noise."
    )
    target: Literal["x0", "velocity", "eps"] = Field(
        default="x0",
        description="Prediction of the decoder (paper: eps, which one step from pure noise cannot use; see "
        "docs/embedder.md).",
    )
    weighting: Literal["x0", "velocity"] = Field(
        default="x0", description="Prediction whose squared error is the loss, whatever the target."
    )
    train_frames: PositiveInt | None = Field(
        default=None,
        description="Frames of each clip that the decoder is trained on in a step, drawn anew; null: all. The encoder "
        "sees all.",
    )
    density: DensityConfig = Field(
        default=DensityConfig(), description="Density of the training timesteps in (0, 1]; 1 is pure noise."
    )
    sampler: SamplerName = Field(default="euler", description="Sampler used by default.")
    steps: PositiveInt = Field(
        default=1, description="Sampling steps used by default; one already reconstructs well (paper)."
    )

    @model_validator(mode="after")
    def _check_pure_noise(self) -> DiffusionConfig:
        if self.target == "eps" and self.density.pure_noise > 0:
            raise ValueError(
                "target 'eps' cannot be turned into pixels at pure noise (the signal's weight is 0); "
                "set diffusion.density.pure_noise=0, or use target 'x0' or 'velocity'"
            )
        return self


class EmbedderTrainConfig(TrainConfig):
    """`TrainConfig` of an embedder's run."""

    losses: LossesConfig = Field(default=LossesConfig(), description="Terms beside the reconstruction's loss.")

    @model_serializer(mode="wrap")
    def _omit_default_losses(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the defaults out, so that configs saved before there were such losses keep their text and hash."""
        values: dict[str, Any] = serialize(self)
        if self.losses == LossesConfig():
            del values["losses"]
        return values


class EmbedderConfig(CommonConfig):
    """Config of an embedder's training, saved in resolved form in its run folder, together with its hash."""

    task: Literal["embedder"] = Field(default="embedder", description="What is trained: an embedder.")
    model: ModelConfig = Field(description="Encoder, conditioning and decoder.")
    diffusion: DiffusionConfig = Field(
        default=DiffusionConfig(), description="Diffusion of the decoder; the magvit2 baseline takes nothing from it."
    )
    data: DataConfig = Field(description="Training and validation data.")
    train: EmbedderTrainConfig = Field(description="Length, batch, intervals and losses.")

    @model_validator(mode="after")
    def _check_signal_floor(self) -> EmbedderConfig:
        losses = self.train.losses
        if self.model.kind == "regen" and self.diffusion.target == "eps" and losses.any and losses.signal_floor > 0:
            raise ValueError(
                f"train.losses.signal_floor {losses.signal_floor:g}: the pixels of a noise prediction "
                "(diffusion.target=eps) diverge near pure noise, where the floor would count them; set "
                "train.losses.signal_floor=0, or use target 'x0' or 'velocity'"
            )
        return self

    @model_validator(mode="after")
    def _check_ssim_window(self) -> EmbedderConfig:
        smallest = min(min(size) for size in self.data.sizes)
        if self.train.losses.ssim.weight > 0 and smallest < SSIM_WINDOW:
            raise ValueError(
                f"train.losses.ssim.weight {self.train.losses.ssim.weight:g}: its window is {SSIM_WINDOW} pixels wide, "
                f"data.size has {smallest}; enlarge data.size, or set train.losses.ssim.weight=0"
            )
        return self

    @model_validator(mode="after")
    def _check_linear_start(self) -> EmbedderConfig:
        if self.model.linear_start == "pca" and self.engine.partitioned_init:
            raise ValueError(
                "model.linear_start=pca fits the linear code before the weights are sharded; set "
                "engine.partitioned_init=false, or model.linear_start=dct"
            )
        return self

    @model_validator(mode="after")
    def _check_sequence_parallel(self) -> EmbedderConfig:
        if self.model.kind == "regen":
            self.engine.check_heads("model.decoder.heads", self.model.decoder.heads)
        elif self.engine.sequence_parallel > 1:
            raise ValueError(
                f"engine.sequence_parallel {self.engine.sequence_parallel}: the convolutional baseline has no row of "
                "tokens to share; set engine.sequence_parallel=1"
            )
        return self
