"""By how much REGEN leads, out of the comparison's JSON, and which targets that misses."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from regen_dist.evaluation.compression.arms import (
    CONTENT_AWARE,
    IN_CONTEXT,
    IN_CONTEXT_TARGET_DB,
    MARGIN_TARGETS_DB,
    baseline,
    regen,
)
from regen_dist.evaluation.compression.measuring import DOUBLE, TRAINED

Facts = Mapping[str, Any]


def psnr_db(facts: Facts, arm: str, size: str = TRAINED, steps: int = 1) -> float | None:
    """Of an arm; None where it was not trained."""
    found = facts["arms"].get(arm)
    return None if found is None else found["measures"][size][str(steps)]["psnr_db"]


def margin_db(facts: Facts, arm: str, other: str, size: str = TRAINED) -> float | None:
    """One-step PSNR of an arm less that of another; None where one was not trained."""
    a, b = (psnr_db(facts, name, size) for name in (arm, other))
    return None if a is None or b is None else a - b


def lead_db(facts: Facts, k: int) -> float | None:
    """Of REGEN over the baseline as published, one step, training resolution."""
    return margin_db(facts, regen(k).name, baseline(k).name)


def margins(facts: Facts) -> dict[str, Any]:
    """Each target beside what was reached: `margin_db` (None where an arm is missing), `target_db`, `met`."""
    found = {f"k = {k}": (lead_db(facts, k), MARGIN_TARGETS_DB.get(k)) for k in compressions(facts)}
    in_context = margin_db(facts, CONTENT_AWARE, IN_CONTEXT, DOUBLE)
    found["over latents in context, at twice the resolution"] = (in_context, IN_CONTEXT_TARGET_DB)
    return {
        name: {"margin_db": margin, "target_db": target, "met": None if target is None else margin >= target}
        for name, (margin, target) in found.items()
        if margin is not None
    }


def missed(facts: Facts) -> list[str]:
    """Targets that are measured and not met, in words."""
    return [
        f"{name}: {each['margin_db']:+.2f} dB, the target is {each['target_db']:+.1f} dB"
        for name, each in margins(facts).items()
        if each["met"] is False
    ] + _not_growing(facts)


def _not_growing(facts: Facts) -> list[str]:
    """The margin over the baseline is to grow with k."""
    found = [(k, lead_db(facts, k)) for k in sorted(MARGIN_TARGETS_DB)]
    known = [(k, margin) for k, margin in found if margin is not None]
    falls = [(a, b) for a, b in pairwise(known) if b[1] <= a[1]]
    return [f"the margin does not grow from k = {a[0]} to k = {b[0]}" for a, b in falls]


def compressions(facts: Facts) -> list[int]:
    """The temporal compressions of the arms that were trained, ascending."""
    return sorted({arm["k"] for arm in facts["arms"].values()})
