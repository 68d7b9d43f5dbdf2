"""The comparison as plots: what is lost with compression, by how much REGEN leads, what more steps do."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from regen_dist.evaluation.compression.arms import (
    COMPRESSIONS,
    PAPER_DB,
    baseline,
    baseline_with_code,
    regen,
    regen_alone,
)
from regen_dist.evaluation.compression.features import NAME
from regen_dist.evaluation.compression.leads import Facts, lead_db, psnr_db
from regen_dist.evaluation.compression.measuring import TRAINED
from regen_dist.evaluation.curves import ACCENT, INK, LINE, STYLE, for_page

# For files that stand alone, the light page's colours.
_COLOURS = {INK: "#667084", LINE: "#e3e6ec", ACCENT: "#3056d3"}
_DASHED, _DOTTED = (0, (5, 2)), (0, (1, 2))
_MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Plot:
    """One plot: a short name for its file, its title, its SVG for a page, and its SVG as a file."""

    name: str
    title: str
    svg: str
    file: str


@dataclass(frozen=True)
class _Series:
    label: str
    points: Sequence[tuple[float, float]]
    colour: str = ACCENT
    dashes: Any = "solid"
    marker: str = "o"


def draw(facts: Facts) -> list[Plot]:
    """All plots for which there are at least two points."""
    wanted = [
        ("psnr", "PSNR against temporal compression, one step", "k", "dB", list(_psnr(facts))),
        ("margin", "Lead over the baseline, one step", "k", "dB", list(_margins(facts))),
        ("steps_psnr", "PSNR against steps", "steps", "dB", list(_by_steps(facts, "psnr_db"))),
        ("steps_frechet", f"{NAME} against steps", "steps", "", list(_by_steps(facts, "frechet"))),
    ]
    return [
        _plot(name, title, (x, y), series)
        for name, title, x, y, series in wanted
        if any(len(each.points) > 1 for each in series)
    ]


def _psnr(facts: Facts) -> Iterator[_Series]:
    shown = (
        (regen, "REGEN", ACCENT, "solid", "o"),
        (regen_alone, "REGEN's decoder alone", ACCENT, _DASHED, "o"),
        (baseline_with_code, "baseline with our linear code", INK, _DASHED, "s"),
        (baseline, "baseline", INK, "solid", "s"),
    )
    for arm, label, colour, dashes, marker in shown:
        found = {k: psnr_db(facts, arm(k).name) for k in COMPRESSIONS}
        yield _Series(label, _known(found), colour, dashes, marker)


def _margins(facts: Facts) -> Iterator[_Series]:
    found = {k: lead_db(facts, k) for k in COMPRESSIONS}
    if not (here := _known(found)):
        return
    yield _Series("here", here)
    for name, what, dashes, marker in (("MCL-JCV", " (the target)", _DASHED, "s"), ("DAVIS", "", _DOTTED, "^")):
        leads = {k: ours - theirs for k, (theirs, ours) in PAPER_DB[name].items()}
        yield _Series(f"paper, {name}{what}", _known(leads), INK, dashes, marker)


def _by_steps(facts: Facts, measure: str) -> Iterator[_Series]:
    for k, marker in zip(COMPRESSIONS, _MARKERS, strict=True):
        if (arm := facts["arms"].get(f"regen-k{k}")) is not None:
            by_steps = arm["measures"][TRAINED]
            yield _Series(f"k = {k}", _known({int(n): each[measure] for n, each in by_steps.items()}), marker=marker)


def _known(found: Mapping[int, float | None]) -> list[tuple[float, float]]:
    return [(float(x), y) for x, y in found.items() if y is not None]


def _plot(name: str, title: str, labels: tuple[str, str], series: Sequence[_Series]) -> Plot:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for each in series:
            if each.points:
                axes.plot(
                    *zip(*each.points, strict=True), color=each.colour, linestyle=each.dashes, marker=each.marker,
                    markersize=4, linewidth=1.8, label=each.label,
                )  # fmt: skip
        _dress(axes, labels, sorted({x for each in series for x, _ in each.points}))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    file = text
    for stand_in, colour in _COLOURS.items():
        file = file.replace(stand_in, colour)
    return Plot(name, title, for_page(text, title), file)


def _dress(axes: Axes, labels: tuple[str, str], ticks: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend(frameon=False, fontsize=9)
    axes.grid(axis="y", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
