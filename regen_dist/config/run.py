"""Config sections of all tasks. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from regen_dist.config.urls import checked_folder, checked_url, expand_home, readable_url
from regen_dist.errors import ConfigError

SPATIAL_COMPRESSION = 8  # paper: one latent cell per 8x8 pixels
SEED_END = 2**63  # seeds are keys of noise and orders, of 64 bits with a sign; a run and data take none below 0

Rate = Annotated[float, Field(gt=0.0, le=1.0)]  # AdamW moves every weight by about so much in a step
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
SamplerName = Literal["euler", "heun", "dpmpp_2m"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
HomePath = Annotated[str, AfterValidator(checked_folder)]  # a local folder; its `~` is expanded once, here
WritableUrl = Annotated[str, AfterValidator(checked_url), AfterValidator(expand_home)]
ReadableUrl = Annotated[str, AfterValidator(readable_url)]


def check_seed(seed: int) -> None:
    """Raise ConfigError if a seed is out of the range."""
    if not -SEED_END <= seed < SEED_END:
        raise ConfigError(f"seed is {seed}; it must be in -2**63 to 2**63 - 1")


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, and no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class CheckpointConfig(Section):
    """Checkpoints: location, interval, retention and verification. Intervals in optimizer steps."""

    url: WritableUrl | None = Field(
        default=None, description="Folder or URL, the run's name is appended; null: checkpoints/ in the run folder."
    )
    every: PositiveInt = Field(default=1000, description="Optimizer steps between checkpoints.")
    asynchronous: bool = Field(
        default=True, description="Write a copy of the state in a thread while training continues."
    )
    on_failure: Literal["continue", "stop"] = Field(
        default="continue", description="When a save fails during training: go on to the next, or stop (exit code 4)."
    )
    verify: Literal["checksums", "sizes"] = Field(
        default="checksums", description="Check of a checkpoint's files before loading; sizes misses changed bytes."
    )
    keep_last: int = Field(
        default=2, ge=2, description="Newest checkpoints to keep; 2 at least, because the newest may be damaged."
    )
    keep_every: PositiveInt | None = Field(
        default=None, description="Also keep the checkpoints of steps that are multiples of this, for good; null: none."
    )
    keep_best: NonNegativeInt = Field(default=0, description="Also keep so many of the best by `best_metric`.")
    best_metric: str = Field(default="psnr_db", description="Metric that `keep_best` compares; of text to video: loss.")
    best_is: Literal["max", "min"] = Field(
        default="max", description="Best value of `best_metric`: the largest or smallest."
    )


class SpikeConfig(Section):
    """Detection and handling of loss spikes."""

    action: Literal["off", "warn", "rollback"] = Field(
        default="warn",
        description="Reaction to a spike; rollback restores the checkpoint before it and skips its samples.",
    )
    window: int = Field(default=128, ge=8, description="Newest unsuspicious losses that a step is compared with.")
    least: int = Field(default=32, ge=4, description="Losses in the window before the first step is judged.")
    threshold: PositiveFloat = Field(
        default=10.0, description="Robust standard deviations above the median that make a loss suspicious."
    )
    patience: PositiveInt = Field(default=3, description="Suspicious losses in a row that are a spike.")
    max_rollbacks: NonNegativeInt = Field(default=3, description="Rollbacks of a run; past them exit code 6.")

    @model_validator(mode="after")
    def _check_window(self) -> SpikeConfig:
        if self.least > self.window:
            raise ValueError(f"least {self.least} is more than window {self.window} holds; nothing would be judged")
        return self


class LatentStdConfig(Section):
    """Allowed range of the latents' std over positions, and the action outside of it."""

    action: Literal["off", "warn", "stop"] = Field(
        default="warn", description="Reaction to a std out of range; stop: exit code 6."
    )
    low: NonNegativeFloat = Field(default=0.02, description="Smallest allowed std; below it a latent says nothing.")
    high: PositiveFloat = Field(
        default=0.99, description="Largest allowed std; above it a latent only touches its bound, 1."
    )
    patience: PositiveInt = Field(default=5, description="Log lines in a row out of range before the action.")


class HangConfig(Section):
    """Time limits for a rank without progress in one phase."""

    beat_s: PositiveFloat = Field(default=5.0, description="Seconds between two heartbeats of a rank.")
    warn_s: PositiveFloat = Field(
        default=120.0, description="Seconds without progress until a warning names the rank and its phase."
    )
    limit_s: PositiveFloat = Field(
        default=900.0,
        description="Seconds without progress until all ranks write their stacks and end with exit code 7.",
    )
    start_limit_s: PositiveFloat = Field(
        default=1800.0, description="`limit_s` until the second step: building, loading and compiling take longer."
    )

    @model_validator(mode="after")
    def _check_limit_order(self) -> HangConfig:
        if not self.beat_s <= self.warn_s < self.limit_s <= self.start_limit_s:
            raise ValueError(
                f"beat_s {self.beat_s:g} <= warn_s {self.warn_s:g} < limit_s {self.limit_s:g} <= start_limit_s "
                f"{self.start_limit_s:g} does not hold; a run is warned of before it is ended"
            )
        return self


class GuardsConfig(Section):
    """Guards: checks that skip steps, stop the run or roll it back."""

    nonfinite_budget: NonNegativeInt = Field(
        default=100, description="Steps of a run that may be skipped for non-finite gradients; past it exit code 6."
    )
    nonfinite_in_a_row: NonNegativeInt = Field(
        default=20, description="The same one after the other; past it the weights are broken: exit code 6."
    )
    spike: SpikeConfig = Field(default=SpikeConfig(), description="Detection of loss spikes.")
    latent_std: LatentStdConfig = Field(default=LatentStdConfig(), description="Allowed spread of the latents.")
    hang: HangConfig = Field(default=HangConfig(), description="Time limits for ranks without progress.")


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]  # at 1 a moment never learns, and its bias correction divides by 0


class OptimizerConfig(Section):
    """AdamW: torch's by default; DeepSpeed's CPU Adam or apex's FusedAdam where they can run."""

    kind: Literal["adamw", "cpu_adam", "fused_adam"] = Field(
        default="adamw", description="AdamW of torch, of DeepSpeed on a CPU, or of NVIDIA apex on a GPU."
    )
    lr: Rate = Field(
        default=1e-4, description="Peak learning rate; AdamW moves every weight by about this much in a step."
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.99), description="Decay of the averages of the gradient and of its square."
    )
    weight_decay: NonNegativeFloat = Field(
        default=0.01, description="Decoupled weight decay: a step takes away lr * weight_decay of every weight."
    )
    warmup_steps: NonNegativeInt = Field(
        default=1000, description="Optimizer steps over which the learning rate rises linearly to `lr`."
    )
    min_lr_ratio: Fraction = Field(
        default=0.1, description="Learning rate of the last step over `lr`; a cosine leads there after the warmup."
    )
    clip_norm: PositiveFloat = Field(
        default=1.0, description="Largest norm of the whole gradient; longer ones are scaled down."
    )

    @model_validator(mode="after")
    def _check_weight_decay(self) -> OptimizerConfig:
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr {self.lr:g} * weight_decay {self.weight_decay:g} is what a step takes away of every weight; it "
                "must be below 1, and is far below in practice (lr=1e-4, weight_decay=0.01)"
            )
        return self


class ZeroConfig(Section):
    """Partitioning of ZeRO-3; DeepSpeed's names in parentheses."""

    prefetch_bucket: NonNegativeInt = Field(
        default=50_000_000, description="Elements gathered ahead of their use (DeepSpeed: stage3_prefetch_bucket_size)."
    )
    sub_group: PositiveInt = Field(
        default=1_000_000_000, description="Elements of one inner optimizer step (DeepSpeed: sub_group_size)."
    )
    partition_size: PositiveInt = Field(
        default=1,
        description="Consecutive ranks, as of a node, that keep a second copy of the weights (hpZ, "
        "zero_hpz_partition_size); 1: none.",
    )
    communication_dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="Precision of the gradients' reduction; auto: fp32 from 64 ranks on, where sums in bf16 lose more "
        "than their last bit.",
    )


FP32_FROM = 64  # ranks

# Activations that the backward pass computes again: none, all of a block, or all but what attention made.
Recomputation = bool | Literal["selective"]


class EngineConfig(Section):
    """Distribution of the step: DeepSpeed ZeRO-3, or plain PyTorch in one process."""

    kind: Literal["zero3", "plain"] = Field(
        default="zero3", description="zero3: DeepSpeed ZeRO-3 on any number of ranks; plain: PyTorch in one process."
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Working precision; the optimizer's master weights are fp32."
    )
    partitioned_init: bool = Field(
        default=False, description="Build parameters already sharded (zero.Init): for models larger than one GPU."
    )
    activation_checkpointing: Recomputation = Field(
        default=False,
        description="Recompute blocks in the backward pass: less memory, more time; selective: all but attention.",
    )
    compile: bool = Field(
        default=False, description="torch.compile of every block, at its first call for each shape; kind plain alone."
    )
    deterministic: bool = Field(
        default=False,
        description="Only kernels with the same result in every run, where torch has them; slower on GPUs.",
    )
    persistence_threshold: NonNegativeInt = Field(
        default=100_000, description="ZeRO-3 keeps parameters of at most this many elements whole on every rank."
    )
    zero: ZeroConfig = Field(default=ZeroConfig(), description="Partitioning of ZeRO-3.")
    sequence_parallel: PositiveInt = Field(
        default=1,
        description="Consecutive ranks that share samples, each with a part of every row of tokens and of the heads; "
        "1: none.",
    )

    @model_validator(mode="after")
    def _check_compile(self) -> EngineConfig:
        if self.compile and self.kind != "plain":
            raise ValueError(
                f"compile: under kind '{self.kind}' hooks gather the weights of every layer inside the blocks, which "
                "torch compiles anew up to its limit, and then not at all; set engine.compile=false, or "
                "engine.kind=plain"
            )
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "compile: a compiled block runs in one piece, in which attention cannot be separated; set "
                "engine.activation_checkpointing to true or false, or engine.compile=false"
            )
        return self

    @model_validator(mode="after")
    def _check_single_process(self) -> EngineConfig:
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

    steps: PositiveInt = Field(description="Optimizer steps of the whole run.")
    batch_global: PositiveInt = Field(description="Samples of one optimizer step, over all ranks and micro-batches.")
    accumulation: PositiveInt = Field(
        default=1, description="Micro-batches of a step, one after the other: more of them need less memory."
    )
    seed: int = Field(
        default=0, ge=0, lt=SEED_END, description="Seed of the initial weights, the order of the data and the noise."
    )
    ema_decay: float = Field(
        default=0.999,
        ge=0.0,
        lt=1.0,
        description="Decay of the weights' moving average per step; 0.999 averages about 1000 steps.",
    )
    log_every: PositiveInt = Field(default=10, description="Optimizer steps between log lines.")
    validate_every: PositiveInt = Field(default=500, description="Optimizer steps between validations.")
    validate_at_start: bool = Field(
        default=False, description="Validate before the first step, too, so that the curve shows what training adds."
    )
    time_limit_s: PositiveFloat | None = Field(
        default=None, description="Seconds from the start until it has saved and ended (exit code 75); null: no limit."
    )
    time_limit_lead_s: NonNegativeFloat = Field(
        default=120.0,
        description="Seconds before `time_limit_s` when training stops: time for steps, saves and a validation.",
    )
    grad_norms_every: PositiveInt | None = Field(
        default=None, description="Optimizer steps between records of the norm of each layer's gradient; null: never."
    )
    slow_ranks_every: PositiveInt = Field(default=100, description="Optimizer steps between reports of slow ranks.")
    trace_samples: bool = Field(
        default=False, description="Write the ids of all trained clips to samples/ in the run folder."
    )
    peak_tflops: PositiveFloat | None = Field(
        default=None, description="Peak TFLOP/s of a rank, for MFU; null: looked up for a GPU, measured on a CPU."
    )

    @model_validator(mode="after")
    def _check_accumulation(self) -> TrainConfig:
        if self.batch_global % self.accumulation:
            raise ValueError(
                f"batch_global {self.batch_global} is not a multiple of accumulation {self.accumulation}"
                "; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_time_limit_lead(self) -> TrainConfig:
        if self.time_limit_s is not None and self.time_limit_lead_s >= self.time_limit_s:
            raise ValueError(
                f"time_limit_lead_s {self.time_limit_lead_s:g} leaves no time to train within time_limit_s "
                f"{self.time_limit_s:g}; raise time_limit_s or lower time_limit_lead_s"
            )
        return self


WANDB_CLOSE_S = 22.0  # longest wait for wandb at the end of a run


class WandbConfig(Section):
    """Weights & Biases. An outage is logged once and never stops a run."""

    mode: Literal["disabled", "offline", "online"] = Field(
        default="disabled", description="Tracking: none, files to upload later, or online."
    )
    project: str = Field(default="regen", description="Project that the run appears in.")
    entity: str | None = Field(
        default=None, description="User or team that owns the project; null: the account's default."
    )


class TensorBoardConfig(Section):
    """TensorBoard's event files, in `tensorboard/` in the run folder. Needs the package `tensorboard`."""

    enabled: bool = Field(
        default=False, description="Write event files to tensorboard/ in the run folder; needs the package tensorboard."
    )


class CommonConfig(Section):
    """Config of runs of every task."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder in `output`."
    )
    output: HomePath = Field(default="runs", description="Folder of the run folders.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="Optimizer and learning rate.")
    engine: EngineConfig = Field(default=EngineConfig(), description="Distribution of the step over ranks.")
    train: TrainConfig = Field(description="Length, batch and intervals.")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="Location, interval, retention and verification of checkpoints."
    )
    guards: GuardsConfig = Field(
        default=GuardsConfig(), description="Checks that skip steps, roll back or stop the run."
    )
    wandb: WandbConfig = Field(default=WandbConfig(), description="Tracking by Weights & Biases.")
    tensorboard: TensorBoardConfig = Field(default=TensorBoardConfig(), description="Tracking by TensorBoard.")

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
