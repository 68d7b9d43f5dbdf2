"""What the checks look at, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from launcher.preflight.estimates import Estimates
from launcher.submitting import Order
from regen_dist.checks.findings import side_by_side
from regen_dist.config import AnyRunConfig

_NAMED = 3


class Finding(NamedTuple):
    """Something that a check has to say. A problem forbids the submission, a note does not."""

    text: str
    forbids: bool


def problem(text: str) -> Finding:
    """What must be mended first."""
    return Finding(text, True)


def note(text: str) -> Finding:
    """What is worth knowing."""
    return Finding(text, False)


@dataclass(frozen=True)
class Subject:
    """An order to be checked.

    Args:
        order: of the job.
        produced: URLs and paths that an earlier job will have made by then.
        estimates: what models need, computed when it is asked for.
    """

    order: Order
    produced: Collection[str] = ()
    estimates: Estimates = field(default_factory=Estimates)

    @property
    def configs(self) -> Sequence[AnyRunConfig]:
        """Of the runs; none where the job is no training."""
        return self.order.configs

    @property
    def on_slurm(self) -> bool:
        """Whether the job runs on other machines than this one."""
        return self.order.cluster.kind == "slurm"


Check = Callable[[Subject], Iterator[Finding]]


def by_run(configs: Sequence[AnyRunConfig], look: Callable[[AnyRunConfig], Iterable[Finding]]) -> Iterator[Finding]:
    """What is found of each run, told once; with the names of the runs where it is not said of all."""
    runs: dict[Finding, list[str]] = {}
    for config, findings in zip(configs, side_by_side(lambda each: list(look(each)), configs), strict=True):
        for finding in dict.fromkeys(findings):
            runs.setdefault(finding, []).append(config.name)
    for finding, names in runs.items():
        who = "" if len(names) == len(configs) else f"{shortened(names)}: "
        yield finding._replace(text=f"{who}{finding.text}")


def shortened(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
