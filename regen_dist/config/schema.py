"""The typed, frozen config of a run. One class a section; every file under `configs/` validates against `RunConfig`.

Imports neither torch nor the library, so that a launcher can validate a config on a login node.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from regen_dist.config.keeping import CheckpointConfig, GuardsConfig, HangConfig, LatentStdConfig, SpikeConfig
from regen_dist.config.section import Fraction, PositiveFloat, PositiveInt, Section
from regen_dist.config.urls import parse_url

__all__ = [
    "AttentionConfig", "CheckpointConfig", "ConditioningConfig", "DataConfig", "DecoderConfig", "DensityConfig",
    "DiffusionConfig", "EncoderConfig", "EngineConfig", "GuardsConfig", "HangConfig", "LatentConfig", "LatentStdConfig",
    "ModelConfig", "OptimizerConfig", "ReadConfig", "RunConfig", "SourceConfig", "SpikeConfig", "StageConfig",
    "TrainConfig", "WandbConfig",
]  # fmt: skip

SPATIAL_COMPRESSION = 8  # paper: one latent cell per 8x8 pixels

TemporalCompression = Literal[4, 8, 16, 32]


class StageConfig(Section):
    """One resolution level of the causal encoder: residual blocks, then a strided causal convolution."""

    channels: PositiveInt
    blocks: PositiveInt = 1
    spatial: Literal[1, 2] = 1
    temporal: Literal[1, 2] = 1


class EncoderConfig(Section):
    """Causal 3D-convolutional encoder. `stem_patch` folds that many pixels a side into channels before the first
    convolution."""

    stem_patch: Literal[1, 2, 4] = 1
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    out_blocks: PositiveInt = 1

    @property
    def spatial(self) -> int:
        """Pixels a side per latent cell."""
        return self.stem_patch * prod(stage.spatial for stage in self.stages)

    @property
    def temporal(self) -> int:
        """Frames (after the first) folded into the motion latent."""
        return prod(stage.temporal for stage in self.stages)


class LatentConfig(Section):
    """Latents lie in a ball by construction (`encoder.bound_latent`); `noise_std` is Gaussian noise added in training,
    for robust decoders."""

    channels: PositiveInt = 8
    noise_std: Annotated[float, Field(ge=0.0)] = 0.0


class ConditioningConfig(Section):
    """SIREN over time, modulated by the motion latent, joined with the content latent (paper, Fig. 3)."""

    width: PositiveInt = 256
    layers: PositiveInt = 3
    omega: Annotated[float, Field(gt=0.0)] = 10.0
    first_frame_rule: bool = True


class AttentionConfig(Section):
    """How self-attention runs: the kernel (`backend`) and who sees whom (`pattern`)."""

    backend: Literal["sdpa", "eager", "flash", "reference"] = "sdpa"
    pattern: Literal["full", "window"] = "full"
    window: tuple[PositiveInt, PositiveInt, PositiveInt] = (9, 8, 8)  # frames, rows, columns of tokens


class DecoderConfig(Section):
    """Pixel-space diffusion transformer (paper: 24 blocks, 16 heads, width 2048, patch 8)."""

    blocks: PositiveInt = 24
    heads: PositiveInt = 16
    width: PositiveInt = 2048
    mlp_ratio: Annotated[float, Field(gt=0.0)] = 4.0
    attention: AttentionConfig = AttentionConfig()

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

    @property
    def num_frames(self) -> int:
        """Frames of a full clip: the first one and `k` that follow."""
        return self.temporal_compression + 1

    @model_validator(mode="after")
    def _strides_make_the_latent(self) -> ModelConfig:
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


class DensityConfig(Section):
    """Where training puts its timesteps in (0, 1]; 1 is pure noise. `pure_noise` is the share of samples at exactly
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
    density: DensityConfig = DensityConfig()
    sampler: Literal["euler", "heun"] = "euler"
    steps: PositiveInt = 1

    @model_validator(mode="after")
    def _eps_has_no_pure_noise(self) -> DiffusionConfig:
        if self.target == "eps" and self.density.pure_noise > 0:
            raise ValueError(
                "target 'eps' cannot be turned into pixels at pure noise (the signal's weight is 0); "
                "set diffusion.density.pure_noise=0, or use target 'x0' or 'velocity'"
            )
        return self


class ReadConfig(Section):
    """How bytes come from the store to a decoding process. Nothing here changes what is trained on."""

    requests: PositiveInt = 8  # at once, for each decoding process
    ahead_mb: PositiveInt = 64  # bytes fetched ahead of the decoder, for each decoding process
    join_kb: Annotated[int, Field(ge=0)] = 256  # neighbours in a shard with a smaller gap come by one request
    stall_s: PositiveFloat = 10.0  # a request that brings nothing for so long is tried again
    deadline_s: PositiveFloat = 120.0  # all tries of a request together; then the run stops and says so
    cache: str | None = None  # folder on a local disk for samples from object storage; None: they are not kept
    cache_gb: PositiveFloat = 20.0


class SourceConfig(Section):
    """One dataset of a mixture. `weight` is its share of the samples, relative to the others' weights."""

    url: str
    weight: PositiveFloat = 1.0

    @field_validator("url")
    @classmethod
    def _url_is_one_we_read(cls, url: str) -> str:
        parse_url(url)
        return url


class DataConfig(Section):
    """Where the clips come from and how they are cut. Sides in pixels, time in frames."""

    url: str | None = None  # one dataset; or
    mixture: tuple[SourceConfig, ...] = ()  # several, drawn by weight
    validation_url: str | None = None
    size: tuple[PositiveInt, PositiveInt] = (64, 64)  # height, width of the training crop
    buckets: tuple[tuple[PositiveInt, PositiveInt], ...] = ()  # several crops: each video goes to the one it fits best
    validation_size: tuple[PositiveInt, PositiveInt] | None = None  # height, width of the validation crop; None: `size`
    # The frame is resized to this before the crop; None keeps the stored size, "fit" makes the crop just fit.
    short_side: PositiveInt | Literal["fit"] | None = None
    stride: tuple[PositiveInt, ...] = (1,)  # frame strides, drawn per clip
    image_fraction: Fraction = 0.0  # share of global batches that are one-frame clips
    flip: bool = True
    max_bad_share: Fraction = 0.01  # of the clips may be stand-ins for samples that cannot be read; then the run stops
    workers: Annotated[int, Field(ge=0)] = 1  # decoding processes per rank; 0 decodes in the rank itself
    prefetch: PositiveInt = 4  # batches that a worker prepares ahead
    read: ReadConfig = ReadConfig()

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every crop that training uses, (height, width)."""
        return self.buckets or (self.size,)

    @property
    def sources(self) -> tuple[str, ...]:
        """URLs of the training data."""
        return tuple(source.url for source in self.mixture) if self.url is None else (self.url,)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weights of `sources`; None for a single dataset."""
        return tuple(source.weight for source in self.mixture) if self.url is None else None

    @field_validator("url", "validation_url")
    @classmethod
    def _url_is_one_we_read(cls, url: str | None) -> str | None:
        if url is not None:
            parse_url(url)
        return url

    @model_validator(mode="after")
    def _one_source_or_a_mixture(self) -> DataConfig:
        if (self.url is None) == (not self.mixture):
            raise ValueError("give either url (one dataset) or mixture (a list of {url, weight})")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("a dataset stands in the mixture twice; give it once, with the sum of the weights")
        return self

    @model_validator(mode="after")
    def _sides_fit_the_latent(self) -> DataConfig:
        named = [("size", self.size), ("validation_size", self.validation_size or self.size)]
        for name, size in [*named, *(("buckets", size) for size in self.buckets)]:
            if any(side % SPATIAL_COMPRESSION for side in size):
                raise ValueError(f"{name} {size} must be multiples of {SPATIAL_COMPRESSION}")
        if isinstance(self.short_side, int):
            for size in self.sizes:
                if self.short_side < min(size):
                    raise ValueError(f"short_side {self.short_side} is smaller than the crop {size}")
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("a size stands in buckets twice")
        return self


class OptimizerConfig(Section):
    """AdamW: torch's by default; DeepSpeed's CPU Adam or apex's FusedAdam where they can run."""

    kind: Literal["adamw", "cpu_adam", "fused_adam"] = "adamw"
    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    min_lr_ratio: Fraction = 0.1
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0


class EngineConfig(Section):
    """How the step is distributed: DeepSpeed ZeRO-3, or plain PyTorch in one process."""

    kind: Literal["zero3", "plain"] = "zero3"
    precision: Literal["bf16", "fp32"] = "bf16"
    # Build each parameter already sharded (zero.Init), in the working precision: for models larger than one GPU.
    partitioned_init: bool = False
    activation_checkpointing: bool = False
    persistence_threshold: Annotated[int, Field(ge=0)] = 100_000  # ZeRO-3 keeps smaller parameters whole on every rank


class TrainConfig(Section):
    """Length, batch and rhythm of a run. A step is an optimizer step."""

    steps: PositiveInt
    batch_global: PositiveInt
    accumulation: PositiveInt = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 500
    time_limit_s: PositiveFloat | None = None  # save and end (code 75) before this much time has passed since the start
    time_limit_lead_s: Annotated[float, Field(ge=0.0)] = 120.0  # how long before: time for a step and a save
    trace_samples: bool = False  # write the ids of every clip that was trained on to samples/ in the run folder
    peak_tflops: float | None = None  # per rank, for MFU; None looks the GPU up or measures the CPU

    @model_validator(mode="after")
    def _accumulation_divides_the_batch(self) -> TrainConfig:
        if self.batch_global % self.accumulation:
            raise ValueError(f"batch_global {self.batch_global} is not a multiple of accumulation {self.accumulation}")
        return self

    @model_validator(mode="after")
    def _the_lead_leaves_time_to_train(self) -> TrainConfig:
        if self.time_limit_s is not None and self.time_limit_lead_s >= self.time_limit_s:
            raise ValueError(
                f"time_limit_lead_s {self.time_limit_lead_s:g} leaves no time to train within time_limit_s "
                f"{self.time_limit_s:g}; raise time_limit_s or lower time_limit_lead_s"
            )
        return self


class WandbConfig(Section):
    """Weights & Biases. An outage is logged once and never stops a run."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "regen"
    entity: str | None = None


class RunConfig(Section):
    """Everything that a run needs. Saved, resolved, in its run folder together with its hash."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: Literal["embedder"] = "embedder"
    output: str = "runs"
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    wandb: WandbConfig = WandbConfig()

    @property
    def folder(self) -> Path:
        """The run folder: where a run keeps everything it writes."""
        return Path(self.output) / self.name

    @property
    def checkpoints(self) -> str:
        """URL or path of the folder that holds this run's checkpoints."""
        if self.checkpoint.url is None:
            return str(self.folder / "checkpoints")
        return f"{self.checkpoint.url.rstrip('/')}/{self.name}"
