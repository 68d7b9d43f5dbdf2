"""Report of `regen bench compression`: leads over the baseline, targets, plots, tables and the page."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regen_dist.evaluation.report import ACCENT, INK, LINE, PAGE, STYLE, for_page, page_environment, replace_file
from regen_dist.evaluation.sheet import sheet_frames, write_sheet
from regen_dist.inference.frames import Frame
from regen_dist.tables import Column, Table, numbers
from tools.bench.compression_measure import DOUBLE, NAME, NOT_GIVEN, OTHER, TRAINED
from tools.bench.compression_runs import (
    ABLATED,
    COMPRESSIONS,
    CONTENT_AWARE,
    IN_CONTEXT,
    IN_CONTEXT_TARGET_DB,
    MARGIN_TARGETS_DB,
    PAPER_DB,
    VARIANTS,
    CompressionArm,
    baseline,
    baseline_with_code,
    linear_code,
    paper_form,
    paper_form_alone,
    regen,
    regen_alone,
)

Facts = Mapping[str, Any]


def psnr_db(facts: Facts, arm: str, size: str = TRAINED, steps: int = 1) -> float | None:
    """Return the PSNR of an arm; None if it was not trained."""
    found = facts["arms"].get(arm)
    return None if found is None else found["measures"][size][str(steps)]["psnr_db"]


def margin_db(facts: Facts, arm: str, other: str, size: str = TRAINED) -> float | None:
    """One-step PSNR of an arm less that of another; None where one was not trained."""
    a, b = (psnr_db(facts, name, size) for name in (arm, other))
    return None if a is None or b is None else a - b


def lead_db(facts: Facts, k: int) -> float | None:
    """Return the lead of REGEN over the baseline as published: one step, training resolution."""
    return margin_db(facts, regen(k).name, baseline(k).name)


def margins(facts: Facts) -> dict[str, Any]:
    """Return each target with the result: `margin_db` (None if an arm is missing), `target_db`, `met`."""
    found = {f"k = {k}": (lead_db(facts, k), MARGIN_TARGETS_DB.get(k)) for k in compressions(facts)}
    in_context = margin_db(facts, CONTENT_AWARE, IN_CONTEXT, DOUBLE)
    found["over latents in context, at twice the resolution"] = (in_context, IN_CONTEXT_TARGET_DB)
    return {
        name: {"margin_db": margin, "target_db": target, "met": None if target is None else margin >= target}
        for name, (margin, target) in found.items()
        if margin is not None
    }


def missed(facts: Facts) -> list[str]:
    """Return descriptions of the measured targets that are not met."""
    found = [
        f"{name}: {each['margin_db']:+.2f} dB, the target is {each['target_db']:+.1f} dB"
        for name, each in margins(facts).items()
        if each["met"] is False
    ]
    leads = [(k, lead) for k in sorted(MARGIN_TARGETS_DB) if (lead := lead_db(facts, k)) is not None]
    falls = [(a, b) for (a, lead), (b, next_lead) in pairwise(leads) if next_lead <= lead]
    return found + [f"the margin does not grow from k = {a} to k = {b}" for a, b in falls]


def compressions(facts: Facts) -> list[int]:
    """Return the temporal compressions of the trained arms, ascending."""
    return sorted({arm["k"] for arm in facts["arms"].values()})


# Plots: quality against compression, lead of REGEN, effect of more steps.

# For files that stand alone, the light page's colours.
_COLOURS = {INK: "#667084", LINE: "#e3e6ec", ACCENT: "#3056d3"}
_DASHED, _DOTTED = (0, (5, 2)), (0, (1, 2))
_MARKERS = ("o", "s", "^", "D")


class Plot(NamedTuple):
    """One plot: a short name for its file, its title, its SVG for a page, and its SVG as a file."""

    name: str
    title: str
    svg: str
    file: str


class _Series(NamedTuple):
    label: str
    points: Sequence[tuple[float, float]]
    colour: str = ACCENT
    dashes: Any = "solid"
    marker: str = "o"


def draw(facts: Facts) -> list[Plot]:
    """Return all plots with at least two points."""
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
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for each in series:
            if each.points:
                axes.plot(
                    *zip(*each.points, strict=True), color=each.colour, linestyle=each.dashes, marker=each.marker,
                    markersize=4, linewidth=1.8, label=each.label,
                )  # fmt: skip
        ticks = sorted({x for each in series for x, _ in each.points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.legend(frameon=False, fontsize=9)
        axes.grid(axis="y", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = file = buffer.getvalue()
    for placeholder, colour in _COLOURS.items():
        file = file.replace(placeholder, colour)
    return Plot(name, title, for_page(text, title), file)


# Tables from the JSON: for the page and, as Markdown, for the terminal.

MET, MISSED = "✓", "✗ missed"
_MEASURES = ("PSNR dB", "SSIM", "VMAF", "Fréchet")
_SIZES = (TRAINED, DOUBLE, OTHER)


def tables(facts: Facts) -> list[Table]:
    """Return all tables for which arms were trained."""
    kinds = (_headline, _linear_code, _paper_form, _variants, _steps, _sizes, _between, _cost)
    return [table for kind in kinds if (table := kind(facts)).rows]


def markdown(facts: Facts) -> str:
    """Format the tables as Markdown, with the missed targets."""
    parts = [f"`{facts['command']}`, {facts['minutes_per_arm']:g} minutes of one core an arm."]
    parts += [table.to_markdown().rstrip("\n") for table in tables(facts)]
    missed = facts["missed"]
    parts.append("Missed: " + "; ".join(missed) + "." if missed else "No target that was measured is missed.")
    parts += [f"Not measured: {each}." for each in not_measured(facts)]
    return "\n\n".join(parts) + "\n"


def _table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", ours: Collection[int] = ()
) -> Table:
    """Return a table of a label and numbers, whose rows `ours` are highlighted."""
    head = [Column(columns[0]), *numbers(*columns[1:])]
    return Table(head, rows, title=title, note=note, styles=dict.fromkeys(ours, "bold"))


def _headline(facts: Facts) -> Table:
    rows: list[list[str]] = []
    ours: set[int] = set()
    for k in compressions(facts):
        margin, target = lead_db(facts, k), MARGIN_TARGETS_DB.get(k)
        for is_ours, arm in enumerate((baseline(k), regen(k))):
            if (found := facts["arms"].get(arm.name)) is None:
                continue
            ours |= {len(rows)} if is_ours else set()
            end = _against(margin, target) if is_ours else ["", "", ""]
            paper = (PAPER_DB[name][k][is_ours] for name in ("MCL-JCV", "DAVIS") if k in PAPER_DB[name])
            figures = _quality(found["measures"][TRAINED]["1"])
            rows.append([found["label"], *figures, *end, " / ".join(f"{each:.2f}" for each in paper)])
    columns = ["one step, training resolution", *_MEASURES, "over the baseline", "target", "", "paper, MCL-JCV / DAVIS"]
    note = (
        "The baseline is MAGVIT-v2's decoder as it was published; the next table has it with our linear code, too. "
        "PSNR is the mean over stretches; the frames that whole clips of k + 1 cover differ a little between k. The "
        "paper's figures are of other videos, models and sizes: what compares is the margin."
    )
    return _table("REGEN beside the baseline", columns, rows, note, ours)


def _linear_code(facts: Facts) -> Table:
    """Return the comparison without the linear code on either side, and with it on both."""
    rows = []
    for k in compressions(facts):
        arms = [arm.name for arm in (baseline(k), regen_alone(k), baseline_with_code(k), regen(k))]
        if sum(name in facts["arms"] for name in arms) > 2:
            figures = [_db(psnr_db(facts, name)) for name in arms]
            leads = [_signed(margin_db(facts, arms[1], arms[0])), _signed(margin_db(facts, arms[3], arms[2]))]
            rows.append([f"{k}", *figures[:2], leads[0], *figures[2:], leads[1], _signed(lead_db(facts, k))])
    columns = [
        "k", "baseline", "REGEN's decoder alone", "lead without the code", "baseline with the code", "REGEN",
        "lead with it in both", "lead in the table above",
    ]  # fmt: skip
    note = (
        "One-step PSNR in dB, training resolution. The linear code is ours; the paper's method has none, and the "
        "published baseline neither."
    )
    return _table("What the linear code does", columns, rows, note)


def _paper_form(facts: Facts) -> Table:
    """Return the effect of local convolutions in the decoder, with and without the linear code."""
    rows = []
    for k in compressions(facts):
        pairs = ((paper_form(k).name, regen(k).name), (paper_form_alone(k).name, regen_alone(k).name))
        if any(name in facts["arms"] for name, _ in pairs):
            rows.append([f"{k}"])
            for paper, ours in pairs:
                gain = _signed(margin_db(facts, ours, paper))
                rows[-1] += [_db(psnr_db(facts, paper)), _db(psnr_db(facts, ours)), gain]
    columns = ["k", "paper's decoder, with the code", "ours", "gain", "paper's decoder, without", "ours", "gain"]
    return _table("What local convolutions do", columns, rows, "One-step PSNR in dB, training resolution.")


def _against(margin: float | None, target: float | None) -> list[str]:
    if margin is None:
        return ["", "" if target is None else f"≥ {target:+.1f}", ""]
    outcome = "" if target is None else MET if margin >= target else MISSED
    return [f"{margin:+.2f} dB", "" if target is None else f"≥ {target:+.1f} dB", outcome]


def _quality(found: Facts) -> list[str]:
    digits = {"psnr_db": 2, "ssim": 3, "vmaf": 1, "frechet": 1}
    return ["–" if found[name] is None else f"{found[name]:.{number}f}" for name, number in digits.items()]


def _steps(facts: Facts) -> Table:
    rows = [
        [arm["label"], steps, *_quality(found)]
        for arm in facts["arms"].values()
        if len(arm["measures"][TRAINED]) > 1 and not arm["against"]
        for steps, found in arm["measures"][TRAINED].items()
    ]
    return _table("More steps, training resolution", ["decoder", "steps", *_MEASURES], rows)


def _sizes(facts: Facts) -> Table:
    shown = {name: f"{size['crop'][0]}×{size['crop'][1]}" for name, size in facts["sizes"].items()}
    rows = [
        [arm["label"], f"{name}, {shown[name]}", *_quality(arm["measures"][name]["1"])]
        for arm in facts["arms"].values()
        for name in _SIZES
    ]
    return _table("Sizes that were never trained on, one step", ["decoder", "size", *_MEASURES], rows)


def _variants(facts: Facts) -> Table:
    rows = []
    for variant in VARIANTS:
        if variant.name not in facts["arms"]:
            continue
        figures = [_db(psnr_db(facts, variant.name, size)) for size in _SIZES]
        changes = [_signed(margin_db(facts, variant.name, variant.against, size)) for size in _SIZES]
        against = facts["arms"].get(variant.against, {}).get("label", variant.against)
        rows.append([variant.label, against, *(f"{a} ({b})" for a, b in zip(figures, changes, strict=True))])
    columns = ["variant", "differs in one thing from", *(f"{size}: PSNR dB (change)" for size in _SIZES)]
    note, margin = "", margin_db(facts, CONTENT_AWARE, IN_CONTEXT, DOUBLE)
    if margin is not None:
        note = "Content-aware positions over latents in context, at twice the training resolution: "
        note += "{}, the target is {} {} (the paper: +6.02 dB).".format(*_against(margin, IN_CONTEXT_TARGET_DB))
    return _table(f"Variants at k = {ABLATED}, one step", columns, rows, note)


def _between(facts: Facts) -> Table:
    rows = []
    for arm in facts["arms"].values():
        found = arm["measures"]["between"]
        ways = [_db(found.get(f"{way}_db")) for way in ("decoded", "decoded_then_blended", "blended")]
        rows.append([arm["label"], f"{found['clips']}", *ways])
    columns = ["decoder", "clips", "decoded at half times", "decoded, then blended", "the source's neighbours blended"]
    note = (
        "Every second of 2k + 1 frames is encoded; PSNR in dB of those that were not, training resolution, one step. "
        "The last column has the source's own frames, which no decoder has."
    )
    return _table("Between frames", columns, [row for row in rows if row[1] != "0"], note)


def _cost(facts: Facts) -> Table:
    columns = [
        "decoder", "learning rate", "steps", "core seconds", "seconds by the clock", "training TFLOP", "parameters",
        "GFLOP to decode a clip",
    ]  # fmt: skip
    rows = []
    for arm in facts["arms"].values():
        training = arm["training"]
        parameters = sum(training["parameters"].values())
        rows.append([
            arm["label"], f"{training['lr']:.2g}", f"{training['steps']}", f"{training['cpu_seconds']:.0f}",
            f"{training['seconds']:.0f}", f"{training['flops'] / 1e12:.1f}", f"{parameters / 1e6:.2f} M",
            f"{training['decode_flops'] / 1e9:.2f}",
        ])  # fmt: skip
    rates = [f"{kind} {found['lr']:.2g}{_tried(found)}" for kind, found in facts["tuning"].items()]
    note = "Learning rates:\n" + ";\n".join(rates) + "."  # short lines, for readers of the file
    return _table("What each arm took", columns, rows, note)


def _tried(found: Facts) -> str:
    if not found["tried"]:
        return ", not tuned"
    tried = ", ".join(f"{each['lr']:.2g}: {each['psnr_db']:.2f} dB" for each in found["tried"])
    return f" (of {tried}, on held-out video of the training film{', at the edge' * found['at_edge']})"


def _db(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def not_measured(facts: Facts) -> list[str]:
    """Return what could not be measured, with reasons."""
    measured = [(arm, size) for arm in facts["arms"].values() for size in _SIZES]
    return [f"{arm['label']}, {size}: {note}" for arm, size in measured for note in arm["measures"][size]["1"]["notes"]]


# The page: a single self-contained `index.html`.

_COLUMNS = 5
_QUALITY = 82  # of WebP


class Sheet(NamedTuple):
    """Frames side by side, as a data URI."""

    title: str
    image: str


def write_page(out: Path, facts: Facts, plots: Sequence[Plot], kept: Mapping[str, Path]) -> Path:
    """Write `index.html` atomically; `kept` has the file with decoded frames of each arm. Return the page's path."""
    text = (
        page_environment()
        .get_template("compression.html.j2")
        .render(
            facts=facts, tables=tables(facts), margins=margins(facts), missed=MISSED, plots=plots,
            sheets=_sheets(facts, kept), not_measured=not_measured(facts),
            frechet=f"{NAME}: {facts.get('fvd') or NOT_GIVEN}",
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )  # fmt: skip
    replace_file(out / PAGE, lambda file: file.write_text(text, encoding="utf-8"))
    return out / PAGE


def _sheets(facts: Facts, kept: Mapping[str, Path]) -> list[Sheet]:
    """Return the sheets of both kinds for each k, with and without the linear code, on the same clips; then of both
    kinds of conditioning at twice the resolution."""
    kinds = (baseline, regen_alone, baseline_with_code, regen)
    wanted = [([arm(k).name for arm in kinds], TRAINED, f"k = {k}") for k in COMPRESSIONS]
    wanted.append(([IN_CONTEXT, CONTENT_AWARE], DOUBLE, "twice the training resolution"))
    found = []
    for arms, size, title in wanted:
        frames = {name: _frames(kept[name], size) for name in arms if name in kept}
        labels = {name: facts["arms"][name]["label"] for name in frames}
        for place in sorted(set.intersection(*map(set, frames.values()))) if frames else ():
            stretch = facts["tests"]["stretches"][place]
            shown = {labels[name]: frames[name][place] for name in frames}
            found.append(Sheet(f"{title}: {stretch['video']}, from frame {stretch['first']}", _data_uri(shown)))
    return found


def _frames(kept: Path, size: str) -> dict[int, dict[str, Frame]]:
    """Return `source` and `made` by index of the stretch."""
    found: dict[int, dict[str, Frame]] = {}
    with np.load(kept, allow_pickle=False) as arrays:
        for name in arrays.files:
            of, place, part = name.split("/")
            if of == size:
                found.setdefault(int(place), {})[part] = arrays[name]
    return found


def _data_uri(arms: Mapping[str, Mapping[str, Frame]]) -> str:
    """Draw the source and each arm's reconstruction; the arms share k and therefore the frames."""
    from PIL import Image

    source = next(iter(arms.values()))["source"]
    chosen = sheet_frames(len(source), _COLUMNS)
    made = {label: [each["made"][number] for number in chosen] for label, each in arms.items()}
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        write_sheet(path, chosen, [source[number] for number in chosen], made, errors=False)
        with Image.open(path) as image:
            image.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# PSNR of the arms against their training time, out of the records of several budgets.

KINDS = (regen, paper_form, baseline_with_code, linear_code, regen_alone, paper_form_alone, baseline)
Budgets = Mapping[float, Facts]  # minutes of one core an arm, and what compression.json holds


def read_budgets(folders: Mapping[float, Path]) -> dict[float, dict[str, Any]]:
    """Return the existing records by minutes, ascending."""
    files = {minutes: folder / "compression.json" for minutes, folder in sorted(folders.items())}
    return {minutes: json.loads(file.read_text("utf-8")) for minutes, file in files.items() if file.is_file()}


def budgets_markdown(budgets: Budgets) -> str:
    """Format for each k, as Markdown, the one-step PSNR of each trained arm at every budget, then the leads without the
    linear code and with it on both sides."""
    tables = (_budget_table(budgets, k) for k in COMPRESSIONS)
    return "\n".join(table.to_markdown() for table in tables if table.rows)


def _budget_table(budgets: Budgets, k: int) -> Table:
    arms = [kind(k) for kind in KINDS]
    found = {arm: [psnr_db(facts, arm.name) for facts in budgets.values()] for arm in arms}
    rows = [[_label(arm), *map(_db, values)] for arm, values in found.items() if any(v is not None for v in values)]
    if rows:
        rows += [
            ["lead with the code in both", *_leads(found[arms[0]], found[arms[2]])],
            ["lead without it", *_leads(found[arms[4]], found[arms[6]])],
        ]
    columns = [f"k = {k}, one-step PSNR dB after", *(f"{minutes:g} min" for minutes in budgets)]
    return _table(f"k = {k}", columns, rows)


def _label(arm: CompressionArm) -> str:
    if not arm.trains:
        return arm.what
    kind = "REGEN" if arm.kind == "regen" else "MAGVIT-v2 style baseline"
    return f"{kind}, {arm.what}" if arm.what else f"{kind}, {'with' if arm.has_code else 'without'} the linear code"


def _leads(ours: list[float | None], theirs: list[float | None]) -> list[str]:
    return ["–" if a is None or b is None else f"{a - b:+.2f}" for a, b in zip(ours, theirs, strict=True)]
