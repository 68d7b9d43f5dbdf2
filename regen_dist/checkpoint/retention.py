"""Retention policy: which checkpoints of a run are deleted. A pure function of the manifests, which the saver and
`regen checkpoint prune` apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.config.run import CheckpointConfig

LEAST_GOOD = 2  # the newest may turn out to be damaged


def to_delete(
    manifests: Sequence[CheckpointManifest],
    newest: CheckpointManifest,
    policy: CheckpointConfig,
    *,
    pinned: frozenset[int] | set[int] = frozenset(),
    is_good: Callable[[CheckpointManifest], bool] = lambda manifest: True,
) -> list[int]:
    """Return the steps to delete, ascending.

    The last `keep_last`, multiples of `keep_every`, the `keep_best` best by `best_metric`, and pinned checkpoints stay.
    Only checkpoints that `newest` was trained from (not those abandoned by a rollback) and whose files exist are
    counted. Later ones of the same history, if `latest` was set back by hand, are left alone. While consecutive steps
    are skipped, the newest checkpoint from before them stays too. Nothing is deleted unless two of those that stay are
    good.

    Args:
        manifests: those of all readable committed checkpoints; unreadable ones are not touched.
        newest: the checkpoint that the run resumes from.
        policy: numbers of checkpoints to keep.
        pinned: steps that always stay.
        is_good: returns true if a checkpoint's files match its manifest; called only for those that stay.
    """
    history = sorted((each for each in manifests if each.is_followed_by(newest)), key=lambda each: each.age)[::-1]
    last = _first(history, max(policy.keep_last, LEAST_GOOD), is_good)
    if len(last) < LEAST_GOOD:
        return []
    best = _first(best_first(history, policy), policy.keep_best, is_good)
    skipped = newest.skipped_in_a_row
    before = [each for each in history if each.step < newest.step - skipped] if skipped else []
    kept = {each.step for each in (*last, *best, *_first(before, 1, is_good))} | set(pinned)
    if policy.keep_every:
        kept |= {each.step for each in history if each.step % policy.keep_every == 0}
    later = {each.step for each in manifests if each.rollbacks == newest.rollbacks and each.step > newest.step}
    return sorted({each.step for each in manifests} - kept - later)


def _first(
    ordered: Sequence[CheckpointManifest], count: int, is_good: Callable[[CheckpointManifest], bool]
) -> list[CheckpointManifest]:
    found: list[CheckpointManifest] = []
    for each in ordered:
        if len(found) == count:
            break
        if is_good(each):
            found.append(each)
    return found


def best_first(history: Sequence[CheckpointManifest], policy: CheckpointConfig) -> list[CheckpointManifest]:
    """Sort checkpoints by `best_metric`, stably, best first; those without the metric, or with NaN, are left out.

    Checkpoints after a validation have its figures until the next one. The first of them has its weights, or those
    nearest to them, and stands for all.
    """
    sign = -1.0 if policy.best_is == "max" else 1.0
    rated = [each for each in history if math.isfinite(each.metrics.get(policy.best_metric, math.nan))]
    first: dict[frozenset[tuple[str, float]], int] = {}
    for each in sorted(rated, key=lambda each: each.step):
        first.setdefault(frozenset(each.metrics.items()), each.step)
    measured = [each for each in rated if each.step == first[frozenset(each.metrics.items())]]
    return sorted(measured, key=lambda each: sign * each.metrics[policy.best_metric])
