"""What keeps a long run from going wrong in silence."""

from __future__ import annotations

from regen_dist.distributed.base import StepResult
from regen_dist.errors import TrainingError


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
