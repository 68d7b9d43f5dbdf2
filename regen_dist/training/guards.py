"""Guards that keep a long run from going wrong unnoticed."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import Tensor

from regen_dist.config import AnyRunConfig, EmbedderConfig
from regen_dist.config.run import LatentStdConfig, SpikeConfig
from regen_dist.distributed.engine import StepResult
from regen_dist.errors import DataError, TrainingError

# Loss spikes: when the loss of several steps in a row is far above that of the steps before.

# The median absolute deviation times this is the standard deviation, where the values are normally distributed.
_STD_OF_MAD = 1.4826

# Lower bound on the spread of a window, as a share of its median. A window of nearly equal losses (a plateau,
# few clips seen again and again) has a MAD of about 0, and any noise would be many of those away. With the default
# threshold of 10 this lets pass 10 % above the median at least; spikes that harm a run are several times the median.
_LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Spike:
    """Suspicious steps in a row, as many as `guards.spike.patience`.

    `first_step` is the first of them, `last_step` the newest; a checkpoint of a step before the first is from before
    the spike. `loss` is that of the last step, `median` and `limit` are what it was compared with.
    """

    first_step: int
    last_step: int
    loss: float
    median: float
    limit: float

    def __str__(self) -> str:
        return (
            f"loss spike in steps {self.first_step} to {self.last_step}: the loss is {self.loss:.6g}, "
            f"the median before was {self.median:.6g}, and up to {self.limit:.6g} is usual"
        )


class SpikeGuard:
    """Judges the global mean loss of each step. It is the same number on every rank, so all ranks decide alike.

    Batches of different kinds (images beside clips, other crops) have losses of different levels: each kind has a
    window of its own, the newest `window` losses of it that were finite and not suspicious. What happens to a loss:

    - It is not finite: nothing at all, as if the step had not been. `NonFiniteGuard` counts those.
    - Its kind's window holds fewer than `least`: it enters the window and is not judged.
    - It is at most median + threshold * spread of the window, where spread is 1.4826 times the median absolute
      deviation, but at least 1 % of the median: it enters the window, and a row of suspicious steps ends here.
    - It is above: the step is suspicious and lengthens the row, over all kinds; the loss does not enter the window.
      The step that makes the row `patience` long is a spike: it is returned, and a new row begins.

    After a spike, by `action`:

    - "warn": every window is emptied. What follows enters them and sets the new level, so a change of level that lasts
      is reported once. Nothing of a kind is judged until `least` of its losses are there again.
    - "rollback": the windows stay as they are; the run goes back, and `restore` puts those of the checkpoint in their
      place.

    With "off" nothing is kept and nothing judged.

    Attributes:
        rollbacks: number of times that the run went back, over all its starts.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self._windows: dict[str, deque[float]] = {}
        self._row: list[int] = []  # the suspicious steps in a row
        self.rollbacks = 0

    def judge(self, step: int, loss: float, kind: str = "") -> Spike | None:
        """Record the loss of a step; return a spike when this step completes one.

        Args:
            step: counted from 1.
            loss: mean over the global batch.
            kind: kind of the batch, for example "17x64x64".
        """
        if self._config.action == "off" or not isfinite(loss):
            return None
        window = self._windows.setdefault(kind, deque(maxlen=self._config.window))
        if len(window) < self._config.least:
            window.append(loss)
            return None
        middle, limit = running_median(window, self._config.threshold)
        if loss <= limit:
            window.append(loss)
            self._row = []
            return None
        self._row.append(step)
        if len(self._row) < self._config.patience:
            return None
        spike = Spike(self._row[0], step, loss, middle, limit)
        self._row = []
        if self._config.action == "warn":
            self._windows = {}
        return spike

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps: numbers, lists and names, which JSON restores bit for bit."""
        windows = {kind: list(window) for kind, window in self._windows.items()}
        return {"windows": windows, "row": list(self._row), "rollbacks": self.rollbacks}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state and decide as the run that saved it would have; `{}` is a fresh start."""
        windows = {} if self._config.action == "off" else state.get("windows", {})
        self._windows = {kind: deque(losses, maxlen=self._config.window) for kind, losses in windows.items()}
        self._row = list(state.get("row", []))
        self.rollbacks = state.get("rollbacks", 0)


def running_median(losses: Sequence[float], threshold: float) -> tuple[float, float]:
    """The median of some losses, and the highest loss that is still usual beside them."""
    middle = median(losses)
    spread = _STD_OF_MAD * median([abs(loss - middle) for loss in losses])
    return middle, middle + threshold * max(spread, _LEAST_SPREAD * abs(middle))


_LATENT_STD = "latent_std_"  # prefix of a task's figures of its latents

_FEW_CLIPS = 1000  # below it a share says little: as many bad samples are allowed as of this number


def poison_nonfinite(loss: Tensor) -> Tensor:
    """Return the loss; if it is not finite, with no finite gradient, so that the one check of the
    gradients, over all ranks, finds both."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Guards:
    """All guards of a run, with what a checkpoint keeps of them. Each judges what all ranks know, so all decide
    alike."""

    def __init__(self, config: AnyRunConfig) -> None:
        self.nonfinite = NonFiniteGuard(config.guards.nonfinite_budget, in_a_row=config.guards.nonfinite_in_a_row)
        self.bad_samples = BadSampleGuard(config.data.max_bad_share)
        self.spikes = SpikeGuard(config.guards.spike)
        self.latents = LatentGuard(_latent_std(config))
        self._clips = config.train.batch_global

    def after_step(self, step: int, result: StepResult, num_replaced: int) -> None:
        """Take note of a step: its result, and the number of replacement samples in the global batch.

        Raises:
            SkippedSteps, DataError: too many steps were skipped, or too many samples are bad.
        """
        self.nonfinite.check(step, result)
        self.bad_samples.check(step, {"bad_samples": num_replaced, "clips": self._clips})

    def figures(self) -> dict[str, float]:
        """Return the figures for the log."""
        return {"skipped": self.nonfinite.skipped, "rollbacks": self.spikes.rollbacks}

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {name: getattr(self, name).state() for name in _GUARDS}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        for name in _GUARDS:
            getattr(self, name).restore(state.get(name, {}))


_GUARDS = ("nonfinite", "bad_samples", "spikes", "latents")


def _latent_std(config: AnyRunConfig) -> LatentStdConfig:
    """Return the range of the latents; off for a frozen encoder, whose latents have a std of about 1 and no bound."""
    frozen = isinstance(config, EmbedderConfig) and config.model.encoder.frozen
    return config.guards.latent_std.model_copy(update={"action": "off"}) if frozen else config.guards.latent_std


class SkippedSteps(TrainingError):
    """Too many steps were skipped, or the last ones of a run."""


class NonFiniteGuard:
    """Counts the steps that every rank skipped because a gradient was not finite somewhere; stops the run when there
    are too many, in all or one after the other.

    A skipped step changes no weight, moment or average on any rank, and its clips are not trained on again.
    """

    def __init__(self, budget: int, skipped: int = 0, *, in_a_row: int = 20) -> None:
        self.budget, self.skipped = budget, skipped
        self._most_in_a_row, self.in_a_row = in_a_row, 0

    def check(self, step: int, result: StepResult) -> None:
        """Record a step.

        Raises:
            SkippedSteps: a budget is used up.
        """
        self.skipped += not result.applied
        self.in_a_row = 0 if result.applied else self.in_a_row + 1
        if self.in_a_row > self._most_in_a_row:
            raise SkippedSteps(
                f"step {step}: the last {self.in_a_row} steps had non-finite gradients, guards.nonfinite_in_a_row "
                f"allows {self._most_in_a_row}: the weights are most likely broken. Lower optimizer.lr, or raise "
                "optimizer.warmup_steps"
            )
        if not result.applied and self.skipped > self.budget:
            raise SkippedSteps(
                f"step {step}: {self.skipped} steps had non-finite gradients, guards.nonfinite_budget allows "
                f"{self.budget}. Lower optimizer.lr, look at the latents' std in metrics.jsonl, or raise the budget"
            )

    def check_end(self, step: int) -> None:
        """Refuse to call a run complete if its last steps were skipped.

        Raises:
            SkippedSteps: they were.
        """
        if self.in_a_row:
            raise SkippedSteps(
                f"the run has reached step {step}, but the last {self.in_a_row} steps had non-finite gradients and "
                "changed nothing. Lower optimizer.lr; where single samples are at fault, raise train.steps to train "
                "past them"
            )

    def state(self) -> dict[str, int]:
        """Return the state that a checkpoint keeps."""
        return {"skipped": self.skipped} | ({"in_a_row": self.in_a_row} if self.in_a_row else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a checkpoint's state; other entries of it are left alone."""
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)


class BadSampleGuard:
    """Counts the samples that could not be read, and stops the run when they are too large a share of all.

    What it judges is summed over the ranks, so all of them stop at the same step. Checked at every step, its state is
    complete at every step; checked at log lines alone, a checkpoint between two of them misses what came since.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self.bad, self.clips = 0, 0

    def check(self, step: int, figures: Mapping[str, float]) -> None:
        """Record `bad_samples` among `clips` since the last check.

        Raises:
            DataError: the share is exceeded.
        """
        self.bad, self.clips = self.bad + int(figures["bad_samples"]), self.clips + int(figures["clips"])
        if self.bad > self._max_share * max(self.clips, _FEW_CLIPS):
            raise DataError(
                f"step {step}: {self.bad} of {self.clips} samples could not be read, data.max_bad_share allows "
                f"{self._max_share:g}. They are listed in bad_samples/ in the run folder; run `regen shards verify`, "
                "build the bad shards again, or raise the share"
            )

    def state(self) -> dict[str, int]:
        """Return the state that a checkpoint keeps."""
        return {"bad": self.bad, "clips": self.clips}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on counting from a checkpoint's state."""
        self.bad, self.clips = state.get("bad", 0), state.get("clips", 0)


class LatentGuard:
    """Watches the figures `latent_std_<name>` of the log lines: the spread of each latent over its positions.

    A latent is out of range while its figure is outside [low, high] or not finite. What is said or done comes at the
    `patience`-th log line in a row, once until the latent was back in range. Figures without such names are left alone.
    """

    def __init__(self, config: LatentStdConfig) -> None:
        self._config = config
        self._outside: dict[str, int] = {}  # name of a latent -> log lines in a row

    def check(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Record a log line, averaged over the ranks. Returns the warnings, one line a latent.

        Raises:
            TrainingError: a latent is out of range, and `guards.latent_std.action` is "stop".
        """
        if self._config.action == "off":
            return []
        names = [name for name in figures if name.startswith(_LATENT_STD)]
        found = [self._judge(name.removeprefix(_LATENT_STD), figures[name]) for name in names]
        problems = [problem for problem in found if problem is not None]
        if problems and self._config.action == "stop":
            raise TrainingError(
                f"step {step}: {'; '.join(problems)}. To go on all the same: guards.latent_std.action=warn"
            )
        return problems

    def _judge(self, name: str, std: float) -> str | None:
        """Return the problem of a latent at the log line that completes `patience` lines in a row; with action=stop, at
        later lines too."""
        config = self._config
        if config.low <= std <= config.high:
            self._outside.pop(name, None)
            return None
        lines = self._outside[name] = self._outside.get(name, 0) + 1
        if lines < config.patience or (lines > config.patience and config.action == "warn"):
            return None
        return (
            f"the std of the {name} latent is {std:.4g} and was out of range at {lines} log lines in a row; "
            f"guards.latent_std allows {config.low:g} to {config.high:g}. {_advice(std, config)}"
        )

    def state(self) -> dict[str, int]:
        """Return the state that a checkpoint keeps."""
        return dict(self._outside)

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint's state: earlier warnings are not repeated."""
        self._outside = dict(state)


def _advice(std: float, config: LatentStdConfig) -> str:
    """Return advice for a latent whose std is `std`."""
    if std < config.low:
        return (
            "The decoder learns next to nothing from it: lower model.latent.noise_std or optimizer.lr, "
            "or lengthen optimizer.warmup_steps"
        )
    if std > config.high:
        return "It does little but touch its bound: lower optimizer.lr or raise optimizer.weight_decay"
    return "The model's weights or inputs are broken: look at grad_norm in metrics.jsonl, and lower optimizer.lr"
