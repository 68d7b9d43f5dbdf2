"""Config sections of all tasks. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from regen_dist.config.urls import checked_url, expand_home, parse_url

SPATIAL_COMPRESSION = 8  # paper: one latent cell per 8x8 pixels

Rate = Annotated[float, Field(gt=0.0, le=1.0)]  # AdamW moves every weight by about so much in a step
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
SamplerName = Literal["euler", "heun", "dpmpp_2m"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
HomePath = Annotated[str, AfterValidator(expand_home)]  # a path or URL whose `~` is expanded once, here


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, and no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


# --- training data ---


class ReadConfig(Section):
    """Reading of bytes from the store by a decoding process. Nothing here changes the training data."""

    requests: PositiveInt = 8  # at once, for each decoding process
    ahead_mb: PositiveInt = 64  # bytes fetched ahead of the decoder, for each decoding process
    join_kb: Annotated[int, Field(ge=0)] = 256  # neighbours in a shard with a smaller gap come by one request
    stall_s: PositiveFloat = 10.0  # a request that brings nothing for so long is tried again
    deadline_s: PositiveFloat = 120.0  # all tries of a request together; then the run stops and says so
    cache: HomePath | None = None  # folder on a local disk for samples from object storage; None: they are not kept
    cache_gb: PositiveFloat = 20.0


class SourceConfig(Section):
    """One dataset of a mixture. `weight` is its share of the samples, relative to the others' weights."""

    url: str
    weight: PositiveFloat = 1.0

    @field_validator("url")
    @classmethod
    def _url_is_one_we_read(cls, url: str) -> str:
        parse_url(url)
        return expand_home(url)


class MixtureConfig(Section):
    """Sources of samples: one dataset or several, and how they are read."""

    url: str | None = None  # one dataset; or
    mixture: tuple[SourceConfig, ...] = ()  # several, drawn by weight
    validation_url: str | None = None
    image_fraction: Fraction = 0.0  # share of global batches that are images: clips of one frame
    max_bad_share: Fraction = 0.01  # of the samples may be stand-ins for those that cannot be read; then the run stops
    read: ReadConfig = ReadConfig()

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the URLs of the training data."""
        return tuple(source.url for source in self.mixture) if self.url is None else (self.url,)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Return the weights of `sources`; None for a single dataset."""
        return tuple(source.weight for source in self.mixture) if self.url is None else None

    @field_validator("url", "validation_url")
    @classmethod
    def _url_is_one_we_read(cls, url: str | None) -> str | None:
        if url is not None:
            parse_url(url)
        return None if url is None else expand_home(url)

    @model_validator(mode="after")
    def _one_source_or_a_mixture(self) -> Self:
        if (self.url is None) == (not self.mixture):
            raise ValueError("give either url (one dataset) or mixture (a list of {url, weight})")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("a dataset stands in the mixture twice; give it once, with the sum of the weights")
        return self


class DataConfig(MixtureConfig):
    """Sources and cropping of clips. Sides in pixels, time in frames."""

    size: tuple[PositiveInt, PositiveInt] = (64, 64)  # height, width of the training crop
    buckets: tuple[tuple[PositiveInt, PositiveInt], ...] = ()  # several crops: each video goes to the one it fits best
    validation_size: tuple[PositiveInt, PositiveInt] | None = None  # height, width of the validation crop; None: `size`
    # The frame is resized to this before the crop; None keeps the stored size, "fit" makes the crop just fit.
    short_side: PositiveInt | Literal["fit"] | None = None
    stride: tuple[PositiveInt, ...] = (1,)  # frame strides, drawn per clip
    flip: bool = True
    workers: Annotated[int, Field(ge=0)] = 1  # decoding processes per rank; 0 decodes in the rank itself
    prefetch: PositiveInt = 4  # batches that a worker prepares ahead

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return every crop that training uses, (height, width)."""
        return self.buckets or (self.size,)

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


# --- checkpoints and guards ---


class CheckpointConfig(Section):
    """Checkpoints: location, interval, retention and verification. Intervals in optimizer steps."""

    url: str | None = None  # folder or bucket; the run's name is appended. None: checkpoints/ in the run folder
    every: PositiveInt = 1000
    asynchronous: bool = True  # the step goes on while a thread writes a copy of the state
    on_failure: Literal["continue", "stop"] = "continue"  # when a checkpoint cannot be written while training goes on
    verify: Literal["checksums", "sizes"] = "checksums"  # of every file of a checkpoint before it is loaded
    # At least 2: the newest may turn out to be damaged.
    keep_last: Annotated[int, Field(ge=2)] = 2
    keep_every: PositiveInt | None = None  # also keep those of steps that are multiples of this, for good
    keep_best: Annotated[int, Field(ge=0)] = 0  # also keep the best so many by `best_metric`
    best_metric: str = "psnr_db"  # of the validation
    best_is: Literal["max", "min"] = "max"

    @field_validator("url")
    @classmethod
    def _url_is_one_we_write(cls, url: str | None) -> str | None:
        return None if url is None else expand_home(checked_url(url))


class SpikeConfig(Section):
    """Detection and handling of loss spikes."""

    action: Literal["off", "warn", "rollback"] = "warn"
    window: Annotated[int, Field(ge=8)] = 128  # the newest finite, unsuspicious losses that a step is compared with
    least: Annotated[int, Field(ge=4)] = 32  # before there are so many, nothing is judged
    threshold: PositiveFloat = 10.0  # robust standard deviations above the window's median
    patience: PositiveInt = 3  # so many suspicious steps in a row are a spike
    max_rollbacks: Annotated[int, Field(ge=0)] = 3  # then the run stops with its own error

    @model_validator(mode="after")
    def _window_holds_the_least(self) -> SpikeConfig:
        if self.least > self.window:
            raise ValueError(f"least {self.least} is more than window {self.window} holds; nothing would be judged")
        return self


class LatentStdConfig(Section):
    """Allowed range of the latents' std over positions, and the action outside of it."""

    action: Literal["off", "warn", "stop"] = "warn"
    low: Annotated[float, Field(ge=0.0)] = 0.02  # below, a latent says nothing
    high: PositiveFloat = 0.99  # above, it does nothing but touch its bound
    patience: PositiveInt = 5  # so many log lines in a row


class HangConfig(Section):
    """Time limits for a rank without progress in one phase."""

    beat_s: PositiveFloat = 5.0  # how often each rank writes its heartbeat
    warn_s: PositiveFloat = 120.0  # then a warning names the rank and the phase
    limit_s: PositiveFloat = 900.0  # then every rank dumps its stacks and the run ends with its own exit code
    start_limit_s: PositiveFloat = 1800.0  # the same until the second step: building, loading, compiling

    @model_validator(mode="after")
    def _the_limits_come_in_order(self) -> HangConfig:
        if not self.beat_s <= self.warn_s < self.limit_s <= self.start_limit_s:
            raise ValueError(
                f"beat_s {self.beat_s:g} <= warn_s {self.warn_s:g} < limit_s {self.limit_s:g} <= start_limit_s "
                f"{self.start_limit_s:g} does not hold; a run is warned of before it is ended"
            )
        return self


class GuardsConfig(Section):
    """Guards: checks that skip steps, stop the run or roll it back."""

    nonfinite_budget: Annotated[int, Field(ge=0)] = 100  # steps skipped for non-finite losses or gradients, in all
    nonfinite_in_a_row: Annotated[int, Field(ge=0)] = 20  # and so many one after the other: the weights are broken
    spike: SpikeConfig = SpikeConfig()
    latent_std: LatentStdConfig = LatentStdConfig()
    hang: HangConfig = HangConfig()


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]  # at 1 a moment never learns, and its bias correction divides by 0


class OptimizerConfig(Section):
    """AdamW: torch's by default; DeepSpeed's CPU Adam or apex's FusedAdam where they can run."""

    kind: Literal["adamw", "cpu_adam", "fused_adam"] = "adamw"
    lr: Rate = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    min_lr_ratio: Fraction = 0.1
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0

    @model_validator(mode="after")
    def _decay_shrinks_weights(self) -> OptimizerConfig:
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr {self.lr:g} * weight_decay {self.weight_decay:g} is what a step takes away of every weight; it "
                "must be below 1, and is far below in practice (lr=1e-4, weight_decay=0.01)"
            )
        return self


class ZeroConfig(Section):
    """Partitioning of ZeRO-3; DeepSpeed's names in parentheses. Sizes count elements."""

    prefetch_bucket: Annotated[int, Field(ge=0)] = 50_000_000  # weights gathered ahead (stage3_prefetch_bucket_size)
    sub_group: PositiveInt = 1_000_000_000  # that one inner optimizer step handles (sub_group_size)
    # hpZ (ZeRO++): so many consecutive ranks, as of a node, keep a second copy of the weights among them, so that the
    # backward pass gathers inside the node (zero_hpz_partition_size). 1: none.
    partition_size: PositiveInt = 1
    # Gradients are reduced in it (communication_data_type). auto: fp32 at `FP32_FROM` ranks and above, where sums in
    # bf16 have lost more than their last bit; below, the working precision.
    communication_dtype: Literal["auto", "bf16", "fp32"] = "auto"


FP32_FROM = 64  # ranks

# Activations that the backward pass computes again: none, all of a block, or all but what attention made.
Recomputation = bool | Literal["selective"]


class EngineConfig(Section):
    """Distribution of the step: DeepSpeed ZeRO-3, or plain PyTorch in one process."""

    kind: Literal["zero3", "plain"] = "zero3"
    precision: Literal["bf16", "fp32"] = "bf16"
    # Build each parameter already sharded (zero.Init), in the working precision: for models larger than one GPU.
    partitioned_init: bool = False
    # Recompute blocks in the backward pass instead of keeping their activations: more operations, less memory.
    # selective: all of a block but attention, whose outputs are kept.
    activation_checkpointing: Recomputation = False
    # Only kernels whose result does not change from run to run, as far as torch has them (docs/gpu.md): on GPUs slower.
    deterministic: bool = False
    persistence_threshold: Annotated[int, Field(ge=0)] = 100_000  # ZeRO-3 keeps smaller parameters whole on every rank
    zero: ZeroConfig = ZeroConfig()
    # So many consecutive ranks share samples: each has a part of every transformer's row of tokens, and of the heads.
    sequence_parallel: PositiveInt = 1

    @model_validator(mode="after")
    def _one_process_shares_nothing(self) -> EngineConfig:
        if self.kind == "plain" and self.zero != ZeroConfig():
            raise ValueError("zero: its keys cut the work of kind 'zero3'; leave them out, or set engine.kind=zero3")
        if self.kind == "plain" and self.sequence_parallel > 1:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel}: kind 'plain' has one rank, which shares no row of "
                "tokens; set engine.kind=zero3, or engine.sequence_parallel=1"
            )
        return self

    def reduces_in(self, world_size: int) -> Literal["bf16", "fp32"]:
        """Return the precision in which ZeRO-3 reduces gradients over this many ranks."""
        if self.zero.communication_dtype != "auto":
            return self.zero.communication_dtype
        return "fp32" if world_size >= FP32_FROM else self.precision

    def check_heads(self, key: str, heads: int) -> None:
        """Check that ranks that share a row of tokens can divide the heads of its attention.

        Args:
            key: config key of the heads.
            heads: heads of the transformer.

        Raises:
            ValueError: the heads are not divisible by `sequence_parallel`.
        """
        if heads % self.sequence_parallel:
            fitting = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ValueError(
                f"engine.sequence_parallel {self.sequence_parallel} does not divide {key} {heads}: ranks that share a "
                f"row of tokens share out its heads; set engine.sequence_parallel to one of {fitting}, or {key} to a "
                "multiple of it"
            )


class TrainConfig(Section):
    """Length, batch and intervals of a run. A step is an optimizer step."""

    steps: PositiveInt
    batch_global: PositiveInt
    accumulation: PositiveInt = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 500
    validate_at_start: bool = False  # once more before the first step: what training adds is seen on the curve
    time_limit_s: PositiveFloat | None = None  # save and end (code 75) before this much time has passed since the start
    time_limit_lead_s: Annotated[float, Field(ge=0.0)] = 120.0  # how long before: time for a step and a save
    grad_norms_every: PositiveInt | None = None  # record the norm of every layer's gradient so often; None: never
    slow_ranks_every: PositiveInt = 100  # steps between reports of which ranks are slow, where there are several
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


class TensorBoardConfig(Section):
    """TensorBoard's event files, in `tensorboard/` in the run folder. Needs the package `tensorboard`."""

    enabled: bool = False


class CommonConfig(Section):
    """Config of runs of every task."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: HomePath = "runs"
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    wandb: WandbConfig = WandbConfig()
    tensorboard: TensorBoardConfig = TensorBoardConfig()

    @property
    def folder(self) -> Path:
        """Return the run folder, which holds everything that a run writes."""
        return Path(self.output) / self.name

    @property
    def checkpoints(self) -> str:
        """Return the URL or path of the folder of this run's checkpoints."""
        if self.checkpoint.url is None:
            return str(self.folder / "checkpoints")
        return f"{self.checkpoint.url.rstrip('/')}/{self.name}"
