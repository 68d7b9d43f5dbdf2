"""Whether a job that is told to go has the time to save."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.cluster import ClusterConfig
from launcher.preflight.findings import Finding, Subject, by_run, note, problem
from launcher.preflight.measured import Measured, measured
from regen_dist.config import AnyRunConfig

_ROUND_S = 10


def times(subject: Subject) -> Iterator[Finding]:
    """The signal comes earlier than two steps and two saves before the limit; the run's own limit likewise."""
    yield from by_run(subject.configs, lambda config: _times_of(config, subject.order.cluster))


def _times_of(config: AnyRunConfig, cluster: ClusterConfig) -> Iterator[Finding]:
    limit_s = None if cluster.time_min is None else cluster.time_min * 60.0
    own_s = config.train.time_limit_s
    if limit_s is not None and own_s is not None and own_s > limit_s - cluster.signal_lead_s:
        yield note(
            f"train.time_limit_s {own_s:g} never comes: the job's own limit, {cluster.time_min} min, is told "
            f"{cluster.signal_lead_s} s before its end"
        )
    if limit_s is None and own_s is None:
        return
    found = measured(config)
    if found is None:
        if limit_s is not None:
            yield note(
                f"signal_lead_s {cluster.signal_lead_s} could not be compared with two steps and two saves: the run "
                "has measured none yet"
            )
        return
    if limit_s is not None:
        yield from _too_short("signal_lead_s", cluster.signal_lead_s, found, cluster, "--set signal_lead_s")
        yield from _hardly_any_time(config, limit_s - cluster.signal_lead_s, found, cluster)
    if own_s is not None:
        lead_s = config.train.time_limit_lead_s
        yield from _too_short("train.time_limit_lead_s", lead_s, found, cluster, "train.time_limit_lead_s")


def _too_short(name: str, lead_s: float, found: Measured, cluster: ClusterConfig, key: str) -> Iterator[Finding]:
    step_s = _step_s(found, cluster)
    needed_s = 2 * step_s + 2 * (found.save_s or 0.0)
    if lead_s > needed_s:
        return
    saves = f"two saves of {found.save_s:.1f} s" if found.save_s is not None else "no save was measured yet"
    at_least = _ROUND_S * (math.floor(needed_s / _ROUND_S) + 1)
    yield problem(
        f"{name} {lead_s:g} is too short for two steps of {step_s:.1f} s and {saves}, {needed_s:.1f} s in all "
        f"(measured by this run{_on(found, cluster)}); give {key}={at_least}"
    )


def _step_s(found: Measured, cluster: ClusterConfig) -> float:
    """As measured; by fewer ranks, so much longer."""
    return found.step_s * max(1.0, found.ranks / cluster.world_size)


def _on(found: Measured, cluster: ClusterConfig) -> str:
    other = found.ranks != cluster.world_size
    return f" on {found.ranks} ranks; now there are {cluster.world_size}" if other else ""


def _hardly_any_time(config: AnyRunConfig, left_s: float, found: Measured, cluster: ClusterConfig) -> Iterator[Finding]:
    start_s = found.start_s or 0.0
    interval_s = config.checkpoint.every * _step_s(found, cluster) + (found.save_s or 0.0)
    if left_s <= start_s + interval_s:
        yield note(
            f"within {cluster.time_min} min less signal_lead_s {cluster.signal_lead_s} the run starts ({start_s:.0f} "
            f"s) but does not get to the checkpoint after checkpoint.every {config.checkpoint.every} steps "
            f"({interval_s:.0f} s): whatever fails costs all of it; save more often, or raise --time"
        )
