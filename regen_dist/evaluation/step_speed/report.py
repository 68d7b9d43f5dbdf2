"""The figures of `regen bench step` as Markdown tables, and those that another run is compared by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from regen_dist.evaluation.figures import Figure
from regen_dist.evaluation.step_speed.ranks import MEMORY_TARGET

_HEAD = ["| measured | figure | ratio (lowest to highest) | target |", "| --- | ---: | ---: | ---: |"]
_NAMES = {"bf16": "bf16", "fp32": "float32"}
Row = tuple[str, str, str, str]


def table(facts: Mapping[str, Any]) -> str:
    """Whatever was measured; parts that were left out are missing."""
    rows = [*_utilisation(facts), *_memory(facts.get("memory", {})), *_sharding(facts), *_against(facts)]
    lines = [*_HEAD, *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join([*lines, *_profile(facts.get("utilisation", {}).get("profile", {}))]) + "\n"


def _utilisation(facts: Mapping[str, Any]) -> Iterator[Row]:
    found = facts.get("utilisation", {"cases": {}, "time_ratios": {}})
    for name, case in found["cases"].items():
        peak = f"{case['peak_tflops']['median'] * 1e3:.0f} GFLOP/s"
        beside = f"{_NAMES[facts['precision']]} matrix products on {_threads(found)}, {peak}"
        target = f"≥ {found['target']:g}" * (name not in found["time_ratios"])
        figure = f"{case['step_s']['median']:.2f} s a step of {case['flops_per_step'] / 1e9:.0f} GFLOP"
        yield f"{name}: the model's operations over {beside}", figure, _spread(case["mfu"]), target
        yield f"{name}: the same by CPU time", "", _spread(case["mfu_by_cpu"]), ""
    for name, ratio in found["time_ratios"].items():
        yield f"{name}: CPU time of a step, beside without", "", _spread(ratio), ""


def _threads(found: Mapping[str, Any]) -> str:
    return f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"


def _memory(found: Mapping[str, Any]) -> Iterator[Row]:
    target = f"{1 - MEMORY_TARGET:g} to {1 + MEMORY_TARGET:g}"
    for name, case in found.items():
        held, resident = (f"{case[f'{kind}_bytes'] / 1e6:.0f} MB" for kind in ("tensor", "resident"))
        yield f"{name}: peak of tensors, beside the estimate of `regen describe`", held, f"{case['ratio']:.2f}", target
        yield f"{name}: peak resident, beside what is written to", resident, f"{case['resident_ratio']:.2f}", ""


def _sharding(facts: Mapping[str, Any]) -> Iterator[Row]:
    found = facts.get("sharding")
    if found is None:
        return
    size = f"{found['parameters'] / 1e6:.0f} million parameters"
    for name, case in found["cases"].items():
        ratio = found["cpu_ratios"].get(name)
        figure = f"{case['cpu_s']['median']:.2f} s"
        target = f"≤ {found['target']:g}" if ratio else ""
        yield f"{name}, {size}: CPU time of a step", figure, _spread(ratio) if ratio else "", target
    yield from _memory(found["memory"])


def _against(facts: Mapping[str, Any]) -> Iterator[Row]:
    for run, found in facts.get("against", {}).items():
        for name, ratio in found["cpu_ratios"].items():
            own, other = (found["cases"][place] for place in (name, found["against"]))
            beside = f"{name} beside {found['against']}"
            yield f"{run}: CPU time of a step, {beside}", f"{own['cpu_s']['median']:.3f} s", _spread(ratio), ""
            less = f"{own['peak_bytes'] / other['peak_bytes']:.2f}"
            yield f"{run}: peak memory, {beside}", f"{own['peak_bytes'] / 1e6:.0f} MB", less, ""


def _profile(found: Mapping[str, Any]) -> Iterator[str]:
    if not found:
        return
    groups = next(iter(found.values()))["groups"]
    yield from ("", "| share of a step | " + " | ".join(found) + " |", "| --- |" + " ---: |" * len(found))
    for group in groups:
        yield f"| {group} | " + " | ".join(f"{each['groups'][group]:.1%}" for each in found.values()) + " |"


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def figures(facts: Mapping[str, Any]) -> Iterator[Figure]:
    """What two records are compared by. By CPU time they move less than by the clock."""
    found = facts.get("utilisation", {"cases": {}, "time_ratios": {}})
    for name, case in found["cases"].items():
        yield Figure(f"{name}, of the peak, by CPU time", case["mfu_by_cpu"]["median"], True)
        yield Figure(f"{name}, step, s", case["step_s"]["median"], False, noise=0.25)
    memory = {**facts.get("memory", {}), **facts.get("sharding", {"memory": {}})["memory"]}
    for name, case in memory.items():
        yield Figure(f"{name}, peak of tensors, bytes", case["tensor_bytes"], False, noise=0.01)
        yield Figure(f"{name}, peak resident bytes", case["resident_bytes"], False, noise=0.05)
    for name, ratio in facts.get("sharding", {}).get("cpu_ratios", {}).items():
        yield Figure(f"{name}, CPU time beside one process", ratio["median"], False)
