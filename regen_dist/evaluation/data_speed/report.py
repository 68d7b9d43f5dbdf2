"""The figures of `regen bench data` as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from regen_dist.evaluation.figures import Figure

_SCALES = {"clips": (1.0, "clips/s"), "bytes": (1e6, "MB/s")}
_HEAD = ["| measured | figure | ratio (lowest to highest) | target |", "| --- | ---: | ---: | ---: |"]


def table(facts: Mapping[str, Any]) -> str:
    """Whatever was measured; parts that were left out are missing."""
    rows: list[Sequence[str]] = []
    for section in [*facts.get("clips", []), *filter(None, [facts.get("small"), facts.get("others")])]:
        rows += _compared(section)
    rows += _waits(facts.get("wait", {}))
    rows += _orders(facts.get("order", []))
    rows += _starts(facts.get("start", {}))
    return "\n".join([*_HEAD, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _compared(section: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    scale, unit = _SCALES[section["unit"]]
    target = f"≥ {section['target']:g}" if "target" in section else ""
    for name, case in section["cases"].items():
        figure = f"{case['per_s']['median'] / scale:.0f} {unit}"
        yield (
            f"{section['what']}: {name}",
            figure,
            _ratio(section["ratios"].get(name)),
            target * (name in section["ratios"]),
        )
    for name in section["ratios"].keys() - section["cases"].keys():
        yield f"{section['what']}: {name}", "", _ratio(section["ratios"][name]), target


def _ratio(found: Mapping[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})" if found else ""


def _waits(runs: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, run in runs.items():
        share = f"{run['data_wait']:.2%} of step time"
        yield f"data wait of a training run from the store: {name}, {run['step_s']:.2f} s a step", share, "", "≤ 2 %"


def _orders(plans: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    for plan in plans:
        cost = f"{plan['seconds']:.2f} s, {plan['peak_mb'] - plan['before_mb']:.1f} MB above {plan['before_mb']:.0f}"
        yield f"planning {plan['samples']:,} samples, {plan['kind']}", cost, "", ""


def _starts(states: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for state, found in states.items():
        parts = ", ".join(f"{found[f'{part}_s']['median']:.1f} s {part}" for part in ("import", "open", "batch"))
        yield f"start to first batch, {state} catalogue", f"{found['seconds']['median']:.1f} s ({parts})", "", ""


def figures(facts: Mapping[str, Any]) -> Iterator[Figure]:
    """What two records are compared by. Ratios within a round move less than rates."""
    for section in [*facts.get("clips", []), *filter(None, [facts.get("small"), facts.get("others")])]:
        for name, case in section["cases"].items():
            yield Figure(f"{section['what']}: {name}, per s", case["per_s"]["median"], True, noise=0.25)
        for name, found in section["ratios"].items():
            yield Figure(f"{section['what']}: {name}, ratio", found["median"], True)
    for name, run in facts.get("wait", {}).items():
        yield Figure(f"step of a training run, {name}, s", run["step_s"], False, noise=0.25)
