"""The arms of the comparison: what each trains, beside what it stands, and what the paper says.

An arm is an ordinary run with other overrides of one config, so encoder, latents, data and optimizer are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from regen_dist.config import RunConfig
from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text

Kind = Literal["regen", "magvit2"]
COMPRESSIONS = (4, 8, 16, 32)
ABLATED = 16  # the temporal compression at which learning rates are tuned and variants are compared

STEPS = (1, 2, 4, 8)

_FULL = ("model.decoder.attention.pattern=full", "model.decoder.attention.backend=sdpa")
_NO_LINEAR = ("model.decoder.linear=false",)
_PAPER = ("model.decoder.local=false",)


@dataclass(frozen=True)
class Arm:
    """One training run. `against` is the arm that it differs from in one thing only."""

    kind: Kind
    k: int
    variant: str = ""
    changes: tuple[str, ...] = ()
    what: str = ""
    against: str = ""

    @property
    def name(self) -> str:
        """Name of its run."""
        return f"{self.kind}-k{self.k}" + (f"-{self.variant}" if self.variant else "")

    @property
    def label(self) -> str:
        """What it is called in tables and pictures."""
        kind = "REGEN" if self.kind == "regen" else "MAGVIT-v2"
        return f"{kind}, k = {self.k}" + (f", {self.what}" if self.what else "")

    @property
    def steps(self) -> tuple[int, ...]:
        """Sampling steps that it is measured at: variants, and the baseline that has no others, decode in one."""
        return STEPS if self.kind == "regen" and not self.variant else STEPS[:1]

    @property
    def has_code(self) -> bool:
        """Whether the linear code stands beside its decoder."""
        return _NO_LINEAR[0] not in self.changes

    def overrides(self, base: RunConfig) -> list[str]:
        """What sets it apart from the config that all start from.

        Raises:
            ConfigError: that config has too few stages for this temporal compression.
        """
        stages = stages_of(base, self.k)
        return [
            f"name={self.name}",
            f"model.kind={self.kind}",
            f"model.temporal_compression={self.k}",
            f"model.encoder.stages={json_text(stages)}",
            *self.changes,
        ]


def regen(k: int) -> Arm:
    """REGEN as this project builds it, with the linear code beside its decoder."""
    return Arm("regen", k)


def baseline(k: int) -> Arm:
    """The baseline as it was published, without our linear code: what the paper's margins are over."""
    return Arm("magvit2", k, changes=_NO_LINEAR)


def regen_alone(k: int) -> Arm:
    """REGEN's decoder as the paper has it, without the linear code."""
    return Arm("regen", k, "no_linear", _NO_LINEAR, "without the linear code", regen(k).name)


def baseline_with_code(k: int) -> Arm:
    """The baseline with our linear code beside its decoder."""
    return Arm("magvit2", k, "linear", (), "with our linear code", baseline(k).name)


def paper_form(k: int) -> Arm:
    """REGEN with the decoder of the paper: no local convolutions."""
    return Arm("regen", k, "paper", _PAPER, "the paper's form", regen(k).name)


def paper_form_alone(k: int) -> Arm:
    """REGEN as the paper has it: neither local convolutions nor the linear code."""
    what = "the paper's form, without the linear code"
    return Arm("regen", k, "paper-no_linear", (*_PAPER, *_NO_LINEAR), what, regen_alone(k).name)


def tuned_at(arm: Arm) -> Arm:
    """The arm at which the learning rate of this one is chosen: of its kind and form, with or without the linear code
    as it is."""
    where = {"regen": (regen_alone, regen), "magvit2": (baseline, baseline_with_code)}
    forms = (paper_form_alone, paper_form) if _PAPER[0] in arm.changes else where[arm.kind]
    return forms[arm.has_code](ABLATED)


# Without the linear code, which would hide what they do: with it a short training hardly leaves where it began.
VARIANTS = (
    Arm(
        "regen", ABLATED, "full-no_linear", (*_FULL, *_NO_LINEAR), "full attention, without the linear code",
        regen_alone(ABLATED).name,
    ),
    Arm(
        "regen", ABLATED, "in_context-no_linear", ("model.conditioning.kind=in_context", *_FULL, *_NO_LINEAR),
        "latents in context, full attention, without the linear code", f"regen-k{ABLATED}-full-no_linear",
    ),
    Arm(
        "regen", ABLATED, "learned_time-no_linear", ("model.conditioning.time=learned", *_NO_LINEAR),
        "learned time embedding, without the linear code", regen_alone(ABLATED).name,
    ),
    Arm(
        "regen", ABLATED, "no_first_frame_rule-no_linear",
        ("model.conditioning.first_frame_rule=false", *_NO_LINEAR),
        "without the first-frame rule and the linear code", regen_alone(ABLATED).name,
    ),
)  # fmt: skip

# Over the baseline in one step, dB of PSNR: the paper's margins on MCL-JCV.
MARGIN_TARGETS_DB = {8: 3.6, 16: 3.8, 32: 5.7}
# At twice the training resolution, over latents in context (the paper's conditioning ablation has 29.41 and 23.39 dB).
IN_CONTEXT_TARGET_DB = 6.0
CONTENT_AWARE, IN_CONTEXT = f"regen-k{ABLATED}-full-no_linear", f"regen-k{ABLATED}-in_context-no_linear"
# One-step PSNR in dB, (baseline, REGEN); at k = 4 of videos of 512x512.
PAPER_DB = {
    "MCL-JCV": {8: (29.14, 32.74), 16: (26.62, 30.41), 32: (22.97, 28.71)},
    "DAVIS": {8: (24.75, 29.34), 16: (21.21, 26.27), 32: (18.23, 23.49)},
    "512x512": {4: (31.49, 32.94)},
}


def all_arms() -> Iterator[Arm]:
    """Both kinds at every temporal compression, each with and without the linear code, the paper's form of REGEN
    likewise, then the variants."""
    for k in COMPRESSIONS:
        yield from (regen(k), baseline(k))
    for k in COMPRESSIONS:
        yield from (regen_alone(k), baseline_with_code(k))
    for k in COMPRESSIONS:
        yield from (paper_form(k), paper_form_alone(k))
    yield from VARIANTS


def chosen_arms(pattern: str) -> list[Arm]:
    """The arms whose whole name a regular expression matches.

    Raises:
        ConfigError: it is none, or matches none.
    """
    try:
        found = [arm for arm in all_arms() if re.fullmatch(pattern, arm.name)]
    except re.error as error:
        raise ConfigError(f"--arms {pattern!r} is no regular expression: {error}") from error
    if not found:
        names = ", ".join(arm.name for arm in all_arms())
        raise ConfigError(f"--arms {pattern!r} matches no arm; there are {names}")
    return found


def stages_of(base: RunConfig, k: int) -> list[dict[str, int]]:
    """The first stages of the config's encoder, so many as make the temporal compression k.

    Raises:
        ConfigError: there are too few, or one of them keeps the frames.
    """
    number, stages = k.bit_length() - 1, base.model.encoder.stages
    if len(stages) < number or any(stage.temporal == 1 for stage in stages[:number]):
        raise ConfigError(
            f"model.encoder.stages has {len(stages)} stages; an encoder of k = {k} is made of the first {number}, each "
            "with temporal: 2"
        )
    return [stage.model_dump() for stage in stages[:number]]
