"""Which checkpoints are kept. A pure decision; the saver and `regen checkpoint prune` carry it out."""

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
    """The steps to delete, ascending.

    Kept are the last `keep_last`, those of steps that are multiples of `keep_every`, the `keep_best` best by
    `best_metric`, and pinned ones. Counted are only checkpoints that `newest` was trained from (not those of a future
    that a guard went back from) and whose files are there. Later ones of the same history, which somebody has pointed
    back from, are left alone. While steps are skipped in a row, the newest from before them stays too. Nothing is
    deleted unless two of those that stay are good.

    Args:
        manifests: of every committed checkpoint that can be read; one that cannot is not touched.
        newest: the one that the run goes on from.
        policy: how many of which.
        pinned: steps that always stay.
        is_good: whether a checkpoint's files are as its manifest says; asked only of those that are to stay.
    """
    history = sorted((each for each in manifests if each.is_followed_by(newest)), key=lambda each: each.age)[::-1]
    last = _first(history, max(policy.keep_last, LEAST_GOOD), is_good)
    if len(last) < LEAST_GOOD:
        return []
    best = _first(best_first(history, policy), policy.keep_best, is_good)
    before = [each for each in history if each.step < newest.trusted_before] if newest.skipped_in_a_row else []
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
    """By `best_metric`; equal ones stay in their order. Those without the metric, or with one that is not a number, are
    left out."""
    sign = -1.0 if policy.best_is == "max" else 1.0
    rated = [each for each in history if math.isfinite(each.metrics.get(policy.best_metric, math.nan))]
    return sorted(rated, key=lambda each: sign * each.metrics[policy.best_metric])
