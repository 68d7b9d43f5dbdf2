"""The page of a run: `index.html` with the table, the videos, the contact sheets and the training curves.

The folder holds all that it shows and refers to nothing outside, so it can be moved, zipped or served as it is.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from regen_dist.errors import DataError
from regen_dist.evaluation.reconstruct import METRICS, RECONSTRUCTION, SHEET, SIDE_BY_SIDE
from regen_dist.evaluation.reconstruction_table import figure, measures_table
from regen_dist.observe.record import read_record
from regen_dist.shared_files import IDLE_S, remove_leftovers, sync, temporary_beside
from regen_dist.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Training curves as SVG that follows the page's colours, light or dark.

# Placeholder colours that matplotlib draws with; the SVG gets the page's own variables instead.
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
    """A chart: its title and its SVG."""

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
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)))  # line styles of the first and the second series
Series = list[tuple[int, float]]  # step, value


def draw_curves(lines: Sequence[dict[str, Any]]) -> list[Curve]:
    """Draw a chart for each known figure in the record. A dashed line marks where the run was resumed.

    Args:
        lines: lines of `metrics.jsonl`.
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
    """Points of one figure, where it is a number."""
    of_kind = [line for line in lines if line["kind"] == line_kind and isinstance(line.get(key), int | float)]
    return [(line["step"], line[key]) for line in of_kind if math.isfinite(line[key])]


def _draw(kind: _Kind, series: Mapping[str, Series], resumed: Sequence[int]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

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
        _style_axes(axes, kind, [value for points in series.values() for _, value in points])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return for_page(buffer.getvalue(), kind.title)


def _style_axes(axes: Axes, kind: _Kind, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

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
    """Extract the SVG element, scaling with the page, in the page's font and colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font: (\d+)px[^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


PAGE, MEDIA, TEMPLATES = "index.html", "media", Path(__file__).parent / "templates"


@dataclass(frozen=True)
class _ShownVideo:
    """One reconstruction on the page, with links relative to it."""

    label: str
    metrics: Mapping[str, Any]
    side_by_side: str
    reconstruction: str
    sheet: str


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read the output of `regen reconstruct` in a folder. Raises DataError when it is incomplete."""
    missing = [name for name in (METRICS, SIDE_BY_SIDE, RECONSTRUCTION, SHEET) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}: run `regen reconstruct … --out {folder}` again")
    found: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return found


def trivial_decoders(reports: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return label and measures of the trivial decoders, of the first report that has them."""
    return list(next((report["trivial"].values() for report in reports if "trivial" in report), ()))


def decoders_table(reports: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Return the table of every reconstruction, highlighted, then of the trivial decoders."""
    styles = dict.fromkeys(range(len(reports)), "bold")
    return measures_table([*reports, *trivial_decoders(reports)], title=title, styles=styles)


def write_report(out: Path, *, title: str, run: Path, reconstructions: Sequence[Path]) -> Path:
    """Write the page; `index.html` comes last and in one move.

    Args:
        out: folder, created if needed; files with the same names are replaced.
        title: title of the page.
        run: run folder, for the curves and the config; parts that it lacks are left out.
        reconstructions: folders that `regen reconstruct` wrote, at least one.

    Returns:
        The page's path.

    Raises:
        DataError: a reconstruction is not complete, or there is none.
    """
    if not reconstructions:
        raise DataError("a report needs at least one folder that `regen reconstruct` wrote")
    reports = [read_metrics(folder) for folder in reconstructions]
    (out / MEDIA).mkdir(parents=True, exist_ok=True)
    shown = [_show(folder, report, out) for folder, report in zip(reconstructions, reports, strict=True)]
    record, config = run / "metrics.jsonl", run / "config.yaml"
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            reports=reports,
            trivial=trivial_decoders(reports),
            measures=decoders_table(reports),
            shown=shown,
            curves=draw_curves(read_record(record)) if record.is_file() else [],
            config=config.read_text(encoding="utf-8") if config.is_file() else "",
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    replace_file(out / PAGE, lambda file: file.write_text(page, encoding="utf-8"))
    return out / PAGE


def _show(folder: Path, report: Mapping[str, Any], out: Path) -> _ShownVideo:
    """Copy what a reconstruction shows into the report's own folder."""
    links = {}
    for name in (SIDE_BY_SIDE, RECONSTRUCTION, SHEET):
        target = out / MEDIA / f"{folder.name}_{name}"
        replace_file(target, partial(shutil.copyfile, folder / name))
        links[name] = f"{MEDIA}/{target.name}"
    return _ShownVideo(report["label"], report, links[SIDE_BY_SIDE], links[RECONSTRUCTION], links[SHEET])


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name, bring it to the disk, then move it into place."""
    remove_leftovers(path.parent, idle_s=IDLE_S)
    unfinished = temporary_beside(path)
    try:
        write(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def page_environment() -> jinja2.Environment:
    """Environment for page templates: values are escaped, and a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["figure"] = figure
    return environment
