"""All checks of a request, and their findings."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from launcher.preflight.findings import Check, PreflightFinding, Subject, problem
from launcher.preflight.runs import alive, library_checks, space, times
from launcher.preflight.scheduler import gpu_memory, ranks_and_gpus, scheduler
from launcher.preflight.storage import checkpoints, folders, shared, wandb_key
from launcher.submit import SubmissionRequest
from regen_dist.errors import ConfigError, RegenError

CHECKS: Sequence[Check] = (
    library_checks, ranks_and_gpus, folders, shared, checkpoints, space, times, gpu_memory, wandb_key, scheduler, alive,
)  # fmt: skip
_STORES = ("AWS_", "GOOGLE_", "AZURE_")


class PreflightError(ConfigError):
    """Refusal of a submission; the message lists all problems."""


@dataclass
class Report:
    """Findings of the checks: problems forbid the submission, notes do not."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_problems(self, name: str) -> None:
        """Raise PreflightError if there are problems."""
        if self.problems:
            count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            raise PreflightError(f"{name} was not submitted: {count}\n{listed}\nFix them, or submit with --force")


def check(request: SubmissionRequest, *, produced: Collection[str] = (), checks: Sequence[Check] = CHECKS) -> Report:
    """Run every check concurrently and independently: one that fails does not hide the others.

    Args:
        request: request for the job.
        produced: URLs and paths of data that an earlier job will produce.
        checks: checks to run; all by default.
    """
    subject = Subject(request, produced)
    with _storage_variables(request.cluster.environment), ThreadPoolExecutor(len(checks)) as threads:
        found = list(threads.map(lambda each: _run(each, subject), checks))
    findings = dict.fromkeys(finding for each in found for finding in each)
    return Report(
        problems=[each.text for each in findings if each.forbids],
        notes=[each.text for each in findings if not each.forbids],
    )


def _run(each: Check, subject: Subject) -> list[PreflightFinding]:
    try:
        return list(each(subject))
    except RegenError as error:
        return [problem(str(error))]
    except Exception as error:  # noqa: BLE001 - reported as a problem, beside the other findings
        name = f"{each.__module__.rpartition('.')[2]}.{getattr(each, '__name__', each)}"
        return [problem(f"the check {name} itself failed: {type(error).__name__}: {error}")]


@contextmanager
def _storage_variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Apply the cluster file's store endpoints, so that stores are queried as the job will query them."""
    ours = {name: value for name, value in environment.items() if name.startswith(_STORES)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
