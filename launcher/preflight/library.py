"""The library's own validation of a job's configs: `regen check` in a subprocess, because it may need torch."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.preflight.findings import PreflightFinding, Subject, by_run, clean_environment, make_note, problem
from regen_dist.checks.findings import Finding as Checked
from regen_dist.config import to_yaml
from regen_dist.errors import BackendError
from regen_dist.programs import regen

_PATIENCE_S = 120.0  # timeout for all configs of a request together


def library(subject: Subject) -> Iterator[PreflightFinding]:
    """Yield what `regen train` would refuse at its start on every rank: `regen check` of each config."""
    if not subject.configs:
        return
    found = dict(zip(map(id, subject.configs), _run_command(subject), strict=True))
    yield from by_run(subject.configs, lambda config: found[id(config)])


def _run_command(subject: Subject) -> list[list[PreflightFinding]]:
    """Return the findings of each config, in order."""
    with tempfile.TemporaryDirectory(prefix="regen-") as folder:
        paths = [Path(folder) / f"{number}.yaml" for number in range(len(subject.configs))]
        for path, config in zip(paths, subject.configs, strict=True):
            path.write_text(to_yaml(config), encoding="utf-8")
        try:
            ended = subprocess.run(
                regen("check", *_arguments(subject, paths)), env=clean_environment(), stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=_PATIENCE_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            silent = make_note(f"the configs were not checked: `regen check` took longer than {_PATIENCE_S:.0f} s")
            return [[silent] for _ in paths]
    try:
        described = json.loads(ended.stdout)["configs"]
        return [[_finding(Checked(**each)) for each in described[str(path)]["findings"]] for path in paths]
    except (ValueError, KeyError, TypeError) as error:
        said = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
        raise BackendError(f"`regen check` failed: {said[-1]}") from error


def _arguments(subject: Subject, paths: Sequence[Path]) -> list[str]:
    cluster = subject.request.cluster
    flags = ["--json", f"--world-size={cluster.world_size}", "--gpus" if cluster.gpus_per_node else "--no-gpus"]
    if cluster.python is not None or cluster.activate:  # packages of another environment cannot be inspected
        flags.append("--elsewhere")
    if any("--fresh" in task.command for task in subject.request.tasks):
        flags.append("--fresh")
    flags += [f"--produced={url}" for url in subject.produced]
    return [*flags, *(f"--also={path}" for path in paths[1:]), "--", str(paths[0])]


def _finding(checked: Checked) -> PreflightFinding:
    return problem(checked.text) if checked.level == "error" else make_note(checked.text)
