"""Sections on what keeps a long run alive: its checkpoints and its guards. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from regen_dist.config.section import PositiveFloat, PositiveInt, Section
from regen_dist.config.urls import checked_url


class CheckpointConfig(Section):
    """Where checkpoints go, how often, which are kept, and how far they are trusted. Counted in optimizer steps."""

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
        return None if url is None else checked_url(url)


class SpikeConfig(Section):
    """What counts as a loss spike, and what is done about it."""

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
    """Where the latents' std over positions should stay, and what is done when it does not."""

    action: Literal["off", "warn", "stop"] = "warn"
    low: Annotated[float, Field(ge=0.0)] = 0.02  # below, a latent says nothing
    high: PositiveFloat = 0.99  # above, it does nothing but touch its bound
    patience: PositiveInt = 5  # so many log lines in a row


class HangConfig(Section):
    """How long a rank may stand still in one phase."""

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
    """What keeps a long run from going wrong in silence."""

    nonfinite_budget: Annotated[int, Field(ge=0)] = 100  # steps skipped for non-finite losses or gradients, in all
    nonfinite_in_a_row: Annotated[int, Field(ge=0)] = 20  # and so many one after the other: the weights are broken
    spike: SpikeConfig = SpikeConfig()
    latent_std: LatentStdConfig = LatentStdConfig()
    hang: HangConfig = HangConfig()
