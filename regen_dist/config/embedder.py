"""The typed, frozen config of an embedder's run, one class a section; `config/t2v.py` has that of text to video.

Imports neither torch nor the library, so that a launcher can validate a config on a login node.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from regen_dist.config.losses import EmbedderTrainConfig
from regen_dist.config.run import (
    SPATIAL_COMPRESSION,
    CheckpointConfig,
    CommonConfig,
    DataConfig,
    EngineConfig,
    Fraction,
    GuardsConfig,
    HangConfig,
    LatentStdConfig,
    MixtureConfig,
    OptimizerConfig,
    PositiveInt,
    ReadConfig,
    SamplerName,
    Section,
    SourceConfig,
    SpikeConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "SPATIAL_COMPRESSION", "AttentionConfig", "CheckpointConfig", "CommonConfig", "ConditioningConfig", "DataConfig",
    "DecoderConfig", "DensityConfig", "DiffusionConfig", "EncoderConfig", "EngineConfig", "GuardsConfig", "HangConfig",
    "LatentConfig", "LatentStdConfig", "MixtureConfig", "ModelConfig", "OptimizerConfig", "ReadConfig", "RunConfig",
    "SourceConfig", "SpikeConfig", "StageConfig", "TrainConfig", "WandbConfig",
]  # fmt: skip

_OF_DIFFUSERS = ("path", "cell", "stride", "precision")
TemporalCompression = Literal[4, 8, 16, 32]


class StageConfig(Section):
    """One resolution level of the causal encoder: residual blocks, then a strided causal convolution."""

    channels: PositiveInt
    blocks: PositiveInt = 1
    spatial: Literal[1, 2] = 1
    temporal: Literal[1, 2] = 1


class EncoderConfig(Section):
    """The encoder: `causal`, our 3D-convolutional one, which is trained; or `diffusers`, that of somebody else's video
    autoencoder, which is not.

    Of the first: `stem_patch` folds that many pixels a side into channels before the first convolution. Of the second:
    `path` is the folder that diffusers has saved it in; `cell` and `stride` are its pixels a side and its frames for
    each latent, and must be what it does; `precision` is the one it works in. What belongs to the other kind is passed
    over, and not saved.
    """

    kind: Literal["causal", "diffusers"] = "causal"
    stem_patch: Literal[1, 2, 4] = 1
    stages: tuple[StageConfig, ...] = ()
    out_blocks: PositiveInt = 1
    path: str | None = None
    cell: Literal[8, 16, 32] = 8
    stride: Literal[1, 2, 4, 8] = 4
    precision: Literal["fp32", "bf16"] = "fp32"

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

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> EncoderConfig:
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
    """Latents lie in a ball by construction (`encoder.bound_latent`); `noise_std` is Gaussian noise added in training,
    for robust decoders."""

    channels: PositiveInt = 8
    noise_std: Annotated[float, Field(ge=0.0)] = 0.0


class ConditioningConfig(Section):
    """Conditioning of the decoder on the latents.

    `content_aware`: a function of time, modulated by the motion latent, joined with the content latent (paper, Fig. 3).
    The function is a SIREN, or one learned vector for each frame (`time`). `in_context`: latents as tokens in front of
    the pixels' (the rival in the paper's conditioning ablation), which takes none of the other settings.
    """

    kind: Literal["content_aware", "in_context"] = "content_aware"
    time: Literal["siren", "learned"] = "siren"
    width: PositiveInt = 256
    layers: PositiveInt = 3
    omega: Annotated[float, Field(gt=0.0)] = 10.0
    first_frame_rule: bool = True


class AttentionConfig(Section):
    """Self-attention: the kernel (`backend`) and the attention pattern (`pattern`)."""

    backend: Literal["sdpa", "eager", "flash", "reference"] = "sdpa"
    pattern: Literal["full", "window"] = "full"
    window: tuple[PositiveInt, PositiveInt, PositiveInt] = (9, 8, 8)  # frames, rows, columns of tokens


class DecoderConfig(Section):
    """Pixel-space diffusion transformer (paper: 24 blocks, 16 heads, width 2048, patch 8). `linear`: whether the linear
    code of `models/linear.py` stands beside the decoder, the baseline's too, which takes nothing else from here."""

    blocks: PositiveInt = 24
    heads: PositiveInt = 16
    width: PositiveInt = 2048
    mlp_ratio: Annotated[float, Field(gt=0.0)] = 4.0
    attention: AttentionConfig = AttentionConfig()
    local: bool = True  # a depthwise 3x3 convolution in every block; the paper's decoder has none
    linear: bool = True

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DecoderConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; choose a width that is")
        return self


class ModelConfig(Section):
    """The embedder: `regen` (diffusion transformer decoder) or `magvit2` (the mirrored causal convolutional
    baseline)."""

    kind: Literal["regen", "magvit2"] = "regen"
    temporal_compression: TemporalCompression = 8
    encoder: EncoderConfig
    latent: LatentConfig = LatentConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    decoder: DecoderConfig = DecoderConfig()
    # Of the linear code beside encoder and decoder: a cosine transform, for decoders that predict x0 (the baseline's
    # too); at random, and zero in the decoder, for the others.
    # "pca" fits it, before the first step, to the first clips of the data (training/linear_start.py).
    linear_start: Literal["dct", "pca", "random"] = "dct"

    @property
    def num_frames(self) -> int:
        """Return the frames of a full clip: k + 1."""
        return self.temporal_compression + 1

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip: content and motion, or those of somebody else's encoder."""
        return 1 + self.temporal_compression // self.encoder.temporal if self.encoder.frozen else 2

    @model_validator(mode="after")
    def _frozen_encoders_have_our_decoder(self) -> ModelConfig:
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
    def _strides_make_the_latent(self) -> ModelConfig:
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
    def _windows_hold_pixels_alone(self) -> ModelConfig:
        pattern = self.decoder.attention.pattern
        if self.kind == "regen" and self.conditioning.kind == "in_context" and pattern != "full":
            raise ValueError(
                f"conditioning.kind 'in_context' needs decoder.attention.pattern 'full', found {pattern!r}: windows "
                "are cut from the grid of pixel tokens, where latent tokens have no place; set "
                "model.decoder.attention.pattern=full, or model.conditioning.kind=content_aware"
            )
        return self


class DensityConfig(Section):
    """Density of the training timesteps in (0, 1]; 1 is pure noise. `pure_noise` is the share of samples at exactly
    1."""

    kind: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: Annotated[float, Field(gt=0.0)] = 1.0
    shift: Annotated[float, Field(gt=0.0)] = 1.0
    pure_noise: Fraction = 0.5


class DiffusionConfig(Section):
    """Noise path, prediction target, timestep density, loss weighting, and the sampler used by default."""

    path: Literal["rectified_flow", "cosine_vp"] = "rectified_flow"
    target: Literal["x0", "velocity", "eps"] = "x0"
    weighting: Literal["x0", "velocity"] = "x0"
    # Of each clip the decoder is trained on so many frames in a step, drawn anew for each; None: on all. The encoder
    # sees them all.
    train_frames: PositiveInt | None = None
    density: DensityConfig = DensityConfig()
    sampler: SamplerName = "euler"
    steps: PositiveInt = 1

    @model_validator(mode="after")
    def _eps_has_no_pure_noise(self) -> DiffusionConfig:
        if self.target == "eps" and self.density.pure_noise > 0:
            raise ValueError(
                "target 'eps' cannot be turned into pixels at pure noise (the signal's weight is 0); "
                "set diffusion.density.pure_noise=0, or use target 'x0' or 'velocity'"
            )
        return self


class RunConfig(CommonConfig):
    """Config of an embedder's training, saved in resolved form in its run folder, together with its hash."""

    task: Literal["embedder"] = "embedder"
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig
    train: EmbedderTrainConfig

    @model_validator(mode="after")
    def _noise_predictions_need_signal(self) -> RunConfig:
        losses = self.train.losses
        if self.model.kind == "regen" and self.diffusion.target == "eps" and losses.any and losses.signal_floor > 0:
            raise ValueError(
                f"train.losses.signal_floor {losses.signal_floor:g}: the pixels of a noise prediction "
                "(diffusion.target=eps) diverge near pure noise, where the floor would count them; set "
                "train.losses.signal_floor=0, or use target 'x0' or 'velocity'"
            )
        return self

    @model_validator(mode="after")
    def _what_is_fitted_is_whole(self) -> RunConfig:
        if self.model.linear_start == "pca" and self.engine.partitioned_init:
            raise ValueError(
                "model.linear_start=pca fits the linear code before the weights are sharded; set "
                "engine.partitioned_init=false, or model.linear_start=dct"
            )
        return self

    @model_validator(mode="after")
    def _ranks_can_share_rows(self) -> RunConfig:
        if self.model.kind == "regen":
            self.engine.check_heads("model.decoder.heads", self.model.decoder.heads)
        elif self.engine.sequence_parallel > 1:
            raise ValueError(
                f"engine.sequence_parallel {self.engine.sequence_parallel}: the convolutional baseline has no row of "
                "tokens to share; set engine.sequence_parallel=1"
            )
        return self
