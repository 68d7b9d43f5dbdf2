"""Checks of the runs: whether they are active, have disk space and time to save, and what `regen check` finds in
them."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launcher.attempts import read_history
from launcher.cluster import ClusterConfig
from launcher.job import JOB_FILE, LAUNCH, Submission, newest_job
from launcher.jobs.find import Member, current_members, has_final_end
from launcher.preflight.findings import (
    NoEstimate,
    PreflightFinding,
    Subject,
    by_run,
    clean_environment,
    make_note,
    problem,
    shortened,
)
from launcher.preflight.storage import nearest
from launcher.submit import SubmissionRequest, is_alive
from regen_dist.checks.findings import Finding as Checked
from regen_dist.config import AnyRunConfig, to_yaml
from regen_dist.config.identity import clips_per_rank
from regen_dist.config.run import WANDB_CLOSE_S
from regen_dist.config.urls import parse_url
from regen_dist.data.storage.local import free_bytes
from regen_dist.data.storage.store import Store
from regen_dist.errors import BackendError, ConfigError, RegenError
from regen_dist.observe.record import read_record
from regen_dist.programs import regen


def alive(subject: Subject) -> Iterator[PreflightFinding]:
    """Check that no active job works in the same folders. Of an array those tasks count that are submitted here."""
    wanted = {task.folder for task in subject.request.tasks}
    for base in dict.fromkeys([subject.request.base, *sorted(wanted), *_sweeps(subject.request.base.parent)]):
        try:
            newest_job(base)  # one that cannot be read may run
            living = _living(base, subject)
        except RegenError as error:
            yield make_note(f"it could not be determined whether the newest job in {base} still runs: {error}")
            continue
        for job, folders in living.values():
            which = "it" if len(wanted) == 1 else ", ".join(folder.name for folder in folders[:3])
            yield problem(
                f"job {job.id()} ({job.cluster_name}) runs or waits for {which} already, in {base}; wait for it, or "
                f"end it first: `regen jobs stop {shlex.quote(str(base))}`"
            )


def _living(base: Path, subject: Subject) -> dict[Path, tuple[Submission, list[Path]]]:
    """Return the jobs of a folder that are active, with the folders of the tasks in whose way they are."""
    found: dict[Path, tuple[Submission, list[Path]]] = {}
    for member in current_members(base):
        if _disturbs(member, subject.request) and not has_final_end(member):
            found.setdefault(member.job.folder, (member.job, []))[1].append(member.task.folder)
    return {folder: (job, folders) for folder, (job, folders) in found.items() if is_alive(job)}


def _disturbs(member: Member, request: SubmissionRequest) -> bool:
    """Return whether a task works in a folder of the request, or one of the two is no array, in one folder."""
    wanted = {task.folder for task in request.tasks}
    alone = request.base in (member.task.folder, *wanted)
    return member.task.folder in wanted or (member.base == request.base and alone)


def _sweeps(folder: Path) -> list[Path]:
    """Return the training arrays whose runs lie in this folder."""
    return sorted({path.parents[2] for path in folder.glob(f"*-sweep/{LAUNCH}/*/{JOB_FILE}")})


# Measurements of a run, from its own record.
_NEWEST = 20


class MeasuredRun(NamedTuple):
    """High values of the newest measurements.

    Args:
        step_s: seconds per step, with `ranks` ranks.
        save_s: seconds per save, from beginning to end; None before the first.
        save_bytes: size of a checkpoint; None before the first.
        validation_s: seconds per validation; 0 before the first.
        start_s: seconds from a start of the job to its first step; None if unknown.
        ranks: number of ranks of the newest start.
    """

    step_s: float
    save_s: float | None
    save_bytes: int | None
    validation_s: float
    start_s: float | None
    ranks: int


def measured(config: AnyRunConfig) -> MeasuredRun | None:
    """Return the measurements of a run; None before it has made steps."""
    path = config.folder / "metrics.jsonl"
    lines = read_record(path) if path.is_file() else []
    steps = _steps(lines)
    if not steps:
        return None
    saves = [line for line in lines if line["kind"] == "checkpoint" and not line["problem"]][-_NEWEST:]
    return MeasuredRun(
        step_s=max(steps[-_NEWEST:]),
        save_s=max((line["seconds"] for line in saves), default=None),
        save_bytes=saves[-1]["bytes"] if saves else None,
        validation_s=max(
            [0.0, *(line.get("seconds", 0.0) for line in lines if line["kind"] == "validation")][-_NEWEST:]
        ),
        start_s=_start_s(config.folder, lines),
        ranks=next((line["world_size"] for line in reversed(lines) if _is_start(line)), 1),
    )


def _steps(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Return the step times of the log lines. The first after a start is warm-up and left out if there are others."""
    warming: list[float] = []
    steady: list[float] = []
    first = True
    for line in lines:
        if line["kind"] == "train":
            (warming if first else steady).append(line["step_s"])
            first = False
        first = first or _is_start(line)
    return steady or warming


def _is_start(line: dict[str, Any]) -> bool:
    return bool(line["kind"] == "event" and line.get("event") == "start")


def _start_s(folder: Path, lines: Sequence[dict[str, Any]]) -> float | None:
    history = read_history(folder / LAUNCH)
    if not history:
        return None
    began = history[-1].start.time
    return next((line["time"] - began for line in lines if _is_start(line) and line["time"] >= began), None)


# Disk space for the checkpoints that a run keeps.
BYTES_PER_PARAMETER = 16  # float32: master weights, two moments, EMA
_DISCRIMINATOR = "discriminator (fp32, on every GPU)"  # of `regen describe`: weights, moments, and gradients
GIB = 2**30


def space(subject: Subject) -> Iterator[PreflightFinding]:
    """Check that every local disk has room for the checkpoints that its runs will keep, beside existing ones."""
    disks: dict[int, list[tuple[AnyRunConfig, Path]]] = {}
    for config in subject.configs:
        folder = parse_url(config.checkpoints).folder
        if folder is not None:
            disks.setdefault(nearest(folder).stat().st_dev, []).append((config, folder))
    for runs in disks.values():
        yield from _one_disk(runs, subject)


def _one_disk(runs: list[tuple[AnyRunConfig, Path]], subject: Subject) -> Iterator[PreflightFinding]:
    needed = 0
    try:
        for config, folder in runs:
            existing_bytes = sum(Store(folder).list().values())
            needed += max(0, checkpoints_kept(config) * _checkpoint_bytes(config, subject) - existing_bytes)
    except NoEstimate as error:
        yield make_note(f"free space was not compared with what checkpoints need: {error}")
        return
    except ConfigError:  # the batch does not fit the ranks, which another check reports
        return
    free, folder = free_bytes(runs[0][1]), runs[0][1]
    if needed > free:
        names = shortened([config.name for config, _ in runs])
        yield problem(
            f"the disk of {folder} has {free / GIB:.1f} GiB free, the checkpoints of {names} need {needed / GIB:.1f} "
            f"GiB more ({checkpoints_kept(runs[0][0])} at once: those kept, one being written, one cut off); make "
            "room, lower checkpoint.keep_last, keep_best or raise keep_every, or set checkpoint.url"
        )


def checkpoints_kept(config: AnyRunConfig) -> int:
    """Return the largest number of checkpoints at a time: those kept, one being written, and one incomplete."""
    policy = config.checkpoint
    for_good = config.train.steps // policy.keep_every if policy.keep_every else 0
    wanted = policy.keep_last + policy.keep_best + for_good
    ever = -(-config.train.steps // policy.every)
    return min(wanted, ever) + 2


def _checkpoint_bytes(config: AnyRunConfig, subject: Subject) -> int:
    found, world_size = measured(config), subject.request.cluster.world_size
    if found is not None and found.save_bytes is not None:
        return found.save_bytes
    clips_per_rank(config, world_size)  # otherwise the estimate would fail with another message
    found_by = subject.estimates.of(config, world_size)
    return BYTES_PER_PARAMETER * found_by.parameters + found_by.memory.get(_DISCRIMINATOR, 0)


# Time to save after the signal.
_ROUND_S = 10


def times(subject: Subject) -> Iterator[PreflightFinding]:
    """Check that the signal comes at least two steps, two saves, a validation, amid which it may come, and the closing
    of wandb before the limit, and the run's own limit likewise."""
    yield from by_run(subject.configs, lambda config: _times_of(config, subject.request.cluster))


def _times_of(config: AnyRunConfig, cluster: ClusterConfig) -> Iterator[PreflightFinding]:
    limit_s = None if cluster.time_min is None else cluster.time_min * 60.0
    own_s = config.train.time_limit_s
    if limit_s is not None and own_s is not None and own_s > limit_s - cluster.signal_lead_s:
        yield make_note(
            f"train.time_limit_s {own_s:g} never applies: the job's own limit, {cluster.time_min} min, is signalled "
            f"{cluster.signal_lead_s} s before its end"
        )
    if limit_s is None and own_s is None:
        return
    found = measured(config)
    if found is None:
        if limit_s is not None:
            yield make_note(
                f"signal_lead_s {cluster.signal_lead_s} could not be compared with two steps and two saves: the run "
                "has measured none yet"
            )
        return
    if limit_s is not None:
        yield from _too_short("signal_lead_s", cluster.signal_lead_s, found, config, cluster, "--set signal_lead_s")
        yield from _check_time_to_checkpoint(config, limit_s - cluster.signal_lead_s, found, cluster)
    if own_s is not None:
        lead_s = config.train.time_limit_lead_s
        yield from _too_short("train.time_limit_lead_s", lead_s, found, config, cluster, "train.time_limit_lead_s")


def _too_short(
    name: str, lead_s: float, found: MeasuredRun, config: AnyRunConfig, cluster: ClusterConfig, key: str
) -> Iterator[PreflightFinding]:
    step_s = _step_s(found, cluster)
    close_s = WANDB_CLOSE_S if config.wandb.mode == "online" else 0.0
    needed_s = 2 * step_s + 2 * (found.save_s or 0.0) + found.validation_s + close_s
    if lead_s > needed_s:
        return
    saves = f"two saves of {found.save_s:.1f} s" if found.save_s is not None else "no save was measured yet"
    saves += f", a validation of {found.validation_s:.1f} s" if found.validation_s else ""
    saves += f", at most {close_s:g} s until wandb is closed" if close_s else ""
    at_least = _ROUND_S * (math.floor(needed_s / _ROUND_S) + 1)
    yield problem(
        f"{name} {lead_s:g} is too short for two steps of {step_s:.1f} s and {saves}, {needed_s:.1f} s in all "
        f"(measured by this run{_on(found, cluster)}); give {key}={at_least}"
    )


def _step_s(found: MeasuredRun, cluster: ClusterConfig) -> float:
    """Return the measured seconds per step, scaled up if fewer ranks run now."""
    return found.step_s * max(1.0, found.ranks / cluster.world_size)


def _on(found: MeasuredRun, cluster: ClusterConfig) -> str:
    other = found.ranks != cluster.world_size
    return f" on {found.ranks} ranks; now there are {cluster.world_size}" if other else ""


def _check_time_to_checkpoint(
    config: AnyRunConfig, left_s: float, found: MeasuredRun, cluster: ClusterConfig
) -> Iterator[PreflightFinding]:
    start_s = found.start_s or 0.0
    interval_s = config.checkpoint.every * _step_s(found, cluster) + (found.save_s or 0.0)
    if left_s <= start_s + interval_s:
        yield make_note(
            f"within {cluster.time_min} min less signal_lead_s {cluster.signal_lead_s} the run starts ({start_s:.0f} "
            f"s) but does not get to the checkpoint after checkpoint.every {config.checkpoint.every} steps "
            f"({interval_s:.0f} s): any failure loses all of it; save more often, or raise --time"
        )


# The library's own validation of a job's configs: `regen check` in a subprocess, because it may need torch.


_PATIENCE_S = 120.0  # timeout for all configs of a request together


def library_checks(subject: Subject) -> Iterator[PreflightFinding]:
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
        output_lines = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
        raise BackendError(f"`regen check` failed: {output_lines[-1]}") from error


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
