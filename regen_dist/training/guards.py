"""What keeps a long run from going wrong in silence."""

from __future__ import annotations

from collections.abc import Mapping

from regen_dist.distributed.base import StepResult
from regen_dist.errors import DataError, TrainingError

_FEW_CLIPS = 1000  # before so many, a share says little: as many bad samples are borne as of this number


class NonFiniteGuard:
    """Counts the steps that every rank skipped because a gradient was not finite somewhere; stops the run when there
    are too many.

    A skipped step changes no weight, moment or average on any rank, and its clips are not trained on again.
    """

    def __init__(self, budget: int, skipped: int = 0) -> None:
        self.budget, self.skipped = budget, skipped

    def check(self, step: int, result: StepResult) -> None:
        """Take note of a step.

        Raises:
            TrainingError: the budget is used up.
        """
        self.skipped += not result.applied
        if self.skipped > self.budget:
            raise TrainingError(
                f"step {step}: {self.skipped} steps had non-finite gradients, train.nonfinite_budget allows "
                f"{self.budget}. Lower optimizer.lr, look at the latents' std in metrics.jsonl, or raise the budget"
            )


class BadSampleGuard:
    """Counts the samples that could not be read, and stops the run when they are too large a share of all.

    What it judges is summed over the ranks, so all of them stop at the same step.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self.bad, self.clips = 0, 0

    def check(self, step: int, figures: Mapping[str, float]) -> None:
        """Take note of `bad_samples` among `clips` since the last check.

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
        """What a checkpoint keeps."""
        return {"bad": self.bad, "clips": self.clips}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on counting from a checkpoint's state."""
        self.bad, self.clips = state.get("bad", 0), state.get("clips", 0)
