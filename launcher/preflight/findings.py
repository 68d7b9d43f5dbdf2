"""Subjects and findings of the preflight checks, and the estimates of `regen describe`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launcher.submit import ROOT, SubmissionRequest
from regen_dist.checks.findings import run_concurrently
from regen_dist.config import AnyRunConfig, EmbedderConfig, to_yaml
from regen_dist.errors import RegenError
from regen_dist.programs import regen, with_safe_path

# Memory estimates by `regen describe`. It builds the model with torch, so it runs in a subprocess.

_PATIENCE_S = 60.0  # timeout for all models of a request together


class NoEstimate(RegenError):
    """Failure of `regen describe`, with the reason."""


@dataclass(frozen=True)
class Estimate:
    """Parameters of a model, and GPU memory in bytes by purpose."""

    parameters: int
    memory: dict[str, int]


@dataclass
class Estimates:
    """Cache of estimates, computed once per model, clip shape and number of ranks. Thread-safe."""

    patience_s: float = _PATIENCE_S
    _known: dict[str, Estimate | NoEstimate] = field(default_factory=dict)
    _spent_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, config: AnyRunConfig, world_size: int) -> Estimate:
        """Return the estimate for a run.

        Raises:
            NoEstimate: torch is missing, or the command timed out or failed.
        """
        key = _key(config, world_size)
        with self._lock:
            if key not in self._known:
                began = time.monotonic()
                self._known[key] = self._run_command(config, world_size)
                self._spent_s += time.monotonic() - began
        found = self._known[key]
        if isinstance(found, NoEstimate):
            raise found
        return found

    def _run_command(self, config: AnyRunConfig, world_size: int) -> Estimate | NoEstimate:
        left_s = self.patience_s - self._spent_s
        try:
            return describe(config, world_size, left_s) if left_s > 0 else _too_long(self.patience_s)
        except subprocess.TimeoutExpired:
            return _too_long(self.patience_s)
        except NoEstimate as error:
            return error


def describe(config: AnyRunConfig, world_size: int, timeout_s: float) -> Estimate:
    """Run `regen describe`.

    Raises:
        NoEstimate: it failed, with its last line.
        subprocess.TimeoutExpired: it took longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="regen-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        command = regen("describe", str(path), "--world-size", str(world_size), "--json")
        ended = subprocess.run(
            command, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    if ended.returncode:
        output_lines = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
        raise NoEstimate(
            f"`regen describe` failed: {output_lines[-1]}; `regen describe` on this config prints all of it"
        )
    described = json.loads(ended.stdout)
    return Estimate(described["parameters"]["total"], described["memory_bytes_per_gpu"])


def clean_environment() -> dict[str, str]:
    """Return the environment for `regen`: the code of this process first on the path, whatever the current folder, and
    no GPUs of this machine."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return with_safe_path({**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""})


def _too_long(patience_s: float) -> NoEstimate:
    return NoEstimate(f"`regen describe` took longer than {patience_s:.0f} s")


def _key(config: AnyRunConfig, world_size: int) -> str:
    """Return everything that an estimate depends on, without what runs of a sweep usually differ in."""
    train = config.train
    parts = [config.model.model_dump_json(), config.engine.model_dump_json(), config.optimizer.kind]
    cut: object
    if isinstance(config, EmbedderConfig):
        cut = config.data.sizes
    else:
        cut = config.data.clips if config.data.image_fraction < 1 else "images"
    return repr([parts, cut, train.batch_global, train.accumulation, world_size])


_NAMED = 3


class PreflightFinding(NamedTuple):
    """Result of a check. A problem forbids the submission, a note does not."""

    text: str
    forbids: bool


def problem(text: str) -> PreflightFinding:
    """Return a finding that must be fixed first."""
    return PreflightFinding(text, True)


def make_note(text: str) -> PreflightFinding:
    """Return a finding for information."""
    return PreflightFinding(text, False)


@dataclass(frozen=True)
class Subject:
    """A request to be checked.

    Args:
        request: request for the job.
        produced: URLs and paths that an earlier job will have produced by then.
        estimates: memory estimates of models, computed on demand.
    """

    request: SubmissionRequest
    produced: Collection[str] = ()
    estimates: Estimates = field(default_factory=Estimates)

    @property
    def configs(self) -> Sequence[AnyRunConfig]:
        """Configs of the runs; empty if the job is not training."""
        return self.request.configs

    @property
    def on_slurm(self) -> bool:
        """True if the job runs on machines other than this one."""
        return self.request.cluster.kind == "slurm"


Check = Callable[[Subject], Iterator[PreflightFinding]]


def by_run(
    configs: Sequence[AnyRunConfig], find: Callable[[AnyRunConfig], Iterable[PreflightFinding]]
) -> Iterator[PreflightFinding]:
    """Yield the findings of each run once, naming the runs unless a finding concerns all of them."""
    runs: dict[PreflightFinding, list[str]] = {}
    for config, findings in zip(configs, run_concurrently(lambda each: list(find(each)), configs), strict=True):
        for finding in dict.fromkeys(findings):
            runs.setdefault(finding, []).append(config.name)
    for finding, names in runs.items():
        who = "" if len(names) == len(configs) else f"{shortened(names)}: "
        yield finding._replace(text=f"{who}{finding.text}")


def shortened(names: Sequence[str]) -> str:
    """Return the first few of many names, and the number of the others."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
