"""All checks of an order, and what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from launcher.submitting import Order
from regen_dist.config.worldsize import clips_per_rank
from regen_dist.errors import ConfigError, RegenError


class PreflightError(ConfigError):
    """Something is wrong with a job that was to be submitted; the message lists all of it."""


@dataclass
class Report:
    """What the checks found: problems forbid the submission, notes do not."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_problems(self, name: str) -> None:
        """Raises PreflightError if there are any."""
        if self.problems:
            count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            raise PreflightError(f"{name} was not submitted: {count}\n{listed}\nMend them, or submit with --force")


Check = Callable[[Order], Iterator[str]]


def check(order: Order) -> Report:
    """Every check, each on its own: one that fails does not hide the others."""
    report = Report()
    for each in (_world_size,):
        try:
            report.problems += each(order)
        except RegenError as error:
            report.problems.append(str(error))
    return report


def _world_size(order: Order) -> Iterator[str]:
    for config in order.configs:
        try:
            clips_per_rank(config, order.cluster.world_size)
        except ConfigError as error:
            yield f"{config.name}: {error}"
