"""Sections that runs of every task have. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from regen_dist.config.keeping import CheckpointConfig, GuardsConfig
from regen_dist.config.section import Fraction, PositiveFloat, PositiveInt, Rate, Section

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
    """How ZeRO-3 cuts its work; DeepSpeed's names in parentheses. Sizes count elements."""

    prefetch_bucket: Annotated[int, Field(ge=0)] = 50_000_000  # weights gathered ahead (stage3_prefetch_bucket_size)
    sub_group: PositiveInt = 1_000_000_000  # that one inner optimizer step handles (sub_group_size)
    # hpZ (ZeRO++): so many consecutive ranks, as of a node, keep a second copy of the weights among them, so that the
    # backward pass gathers inside the node (zero_hpz_partition_size). 1: none.
    partition_size: PositiveInt = 1
    # Gradients are reduced in it (communication_data_type). auto: fp32 at `FP32_FROM` ranks and above, where sums in
    # bf16 have lost more than their last bit; below, the working precision.
    communication_dtype: Literal["auto", "bf16", "fp32"] = "auto"


FP32_FROM = 64  # ranks


class EngineConfig(Section):
    """How the step is distributed: DeepSpeed ZeRO-3, or plain PyTorch in one process."""

    kind: Literal["zero3", "plain"] = "zero3"
    precision: Literal["bf16", "fp32"] = "bf16"
    # Build each parameter already sharded (zero.Init), in the working precision: for models larger than one GPU.
    partitioned_init: bool = False
    activation_checkpointing: bool = False
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
        """The precision in which ZeRO-3 reduces gradients over so many ranks."""
        if self.zero.communication_dtype != "auto":
            return self.zero.communication_dtype
        return "fp32" if world_size >= FP32_FROM else self.precision

    def check_heads(self, key: str, heads: int) -> None:
        """Ranks that share a row of tokens share out the heads of its attention.

        Args:
            key: of the config, that sets them.
            heads: of the transformer.

        Raises:
            ValueError: they do not divide.
        """
        if heads % self.sequence_parallel:
            fitting = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ValueError(
                f"engine.sequence_parallel {self.sequence_parallel} does not divide {key} {heads}: ranks that share a "
                f"row of tokens share out its heads; set engine.sequence_parallel to one of {fitting}, or {key} to a "
                "multiple of it"
            )


class TrainConfig(Section):
    """Length, batch and rhythm of a run. A step is an optimizer step."""

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


class CommonConfig(Section):
    """What runs of every task need."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: str = "runs"
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    wandb: WandbConfig = WandbConfig()

    @field_validator("output")
    @classmethod
    def _home_is_expanded(cls, output: str) -> str:
        """Once, for all that read it; a `~` that nothing expands would be a folder of that name."""
        expanded = os.path.expanduser(output)
        if expanded.startswith("~"):
            raise ValueError(f"found {output!r}, and no home folder of that name; write the path in full")
        return expanded

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
