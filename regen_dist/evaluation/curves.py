"""Training curves as SVG that follows the page's colours, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# Stand-ins that matplotlib draws with; the page's own variables take their place in the SVG.
INK, LINE, ACCENT = "#010203", "#040506", "#070809"
_VARIABLES = {INK: "var(--faint)", LINE: "var(--line)", ACCENT: "var(--accent)"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regen",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": LINE,
}


@dataclass(frozen=True)
class Curve:
    """One chart: what it shows, and its SVG."""

    title: str
    last: str
    svg: str


@dataclass(frozen=True)
class _Kind:
    title: str
    line_kind: str
    keys: tuple[str, ...]
    unit: str = ""
    logarithmic: bool = False


_KINDS = (
    _Kind("Training loss", "train", ("loss",), logarithmic=True),
    _Kind("PSNR of the validation clips, one step", "validation", ("psnr_db",), " dB"),
    _Kind("Loss on the validation rows", "validation", ("loss",), logarithmic=True),
    _Kind("Standard deviation of the latents", "train", ("latent_std_content", "latent_std_motion")),
    _Kind("Speed", "train", ("clips_per_s",), " clips/s"),
)
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)))  # of the first and the second series
Series = list[tuple[int, float]]  # step, value


def draw_curves(lines: Sequence[dict[str, Any]]) -> list[Curve]:
    """A chart for each known figure that the record has. A dashed line stands where the run was resumed.

    Args:
        lines: of `metrics.jsonl`.
    """
    resumed = [line["step"] for line in lines if line.get("event") == "start" and line["step"] > 0]
    curves = []
    for kind in _KINDS:
        found = {key: _series(lines, kind.line_kind, key) for key in kind.keys}
        series = {key: points for key, points in found.items() if points}
        if series:
            last = " · ".join(f"{points[-1][1]:.3g}" for points in series.values())
            curves.append(Curve(kind.title, f"{last}{kind.unit}", _draw(kind, series, resumed)))
    return curves


def _series(lines: Sequence[dict[str, Any]], line_kind: str, key: str) -> Series:
    return [(line["step"], line[key]) for line in lines if line["kind"] == line_kind and _is_number(line.get(key))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _draw(kind: _Kind, series: Mapping[str, Series], resumed: Sequence[int]) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for (key, points), dashes in zip(series.items(), _DASHES, strict=False):
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < 40 else ""
            label = key.rsplit("_", 1)[-1]
            axes.plot(
                steps, values, color=ACCENT, linewidth=1.8, linestyle=dashes, marker=marker, markersize=3, label=label
            )
        if len(series) > 1:
            axes.legend(frameon=False, handlelength=2.6)
        for step in resumed:
            axes.axvline(step, color=INK, linestyle=(0, (3, 3)), linewidth=1)
        _dress(axes, kind, [value for points in series.values() for _, value in points])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return for_page(buffer.getvalue(), kind.title)


def _dress(axes: Axes, kind: _Kind, values: Sequence[float]) -> None:
    if kind.logarithmic and min(values) > 0 and max(values) / min(values) > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("step")
    axes.grid(axis="y", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.margins(x=0.02)


def for_page(svg: str, title: str) -> str:
    """The element alone, scaling with the page, in the page's font and colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font: (\d+)px[^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
