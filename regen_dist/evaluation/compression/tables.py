"""The tables of the comparison, out of its JSON: for the page and, as Markdown, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from regen_dist.evaluation.compression.arms import (
    ABLATED,
    CONTENT_AWARE,
    IN_CONTEXT,
    IN_CONTEXT_TARGET_DB,
    MARGIN_TARGETS_DB,
    PAPER_DB,
    VARIANTS,
    baseline,
    baseline_with_code,
    paper_form,
    paper_form_alone,
    regen,
    regen_alone,
)
from regen_dist.evaluation.compression.leads import Facts, compressions, lead_db, margin_db, psnr_db
from regen_dist.evaluation.compression.measuring import DOUBLE, OTHER, TRAINED

MET, MISSED = "✓", "✗ missed"
_MEASURES = ("PSNR dB", "SSIM", "VMAF", "Fréchet")
_SIZES = (TRAINED, DOUBLE, OTHER)


@dataclass(frozen=True)
class Table:
    """`rows` are texts; `ours` the numbers of the rows that stand out."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    ours: frozenset[int] = frozenset()


def tables(facts: Facts) -> list[Table]:
    """All tables that the arms which were trained can fill."""
    made = [
        _headline(facts),
        _linear_code(facts),
        _paper_form(facts),
        _variants(facts),
        _steps(facts),
        _sizes(facts),
        _between(facts),
        _cost(facts),
    ]
    return [table for table in made if table.rows]


def markdown(facts: Facts) -> str:
    """The tables as Markdown, with the targets that are missed."""
    parts = [f"`{facts['command']}`, {facts['minutes_per_arm']:g} minutes of one core an arm."]
    parts += [to_markdown(table) for table in tables(facts)]
    missed = facts["missed"]
    parts.append("Missed: " + "; ".join(missed) + "." if missed else "No target that was measured is missed.")
    parts += [f"Not measured: {each}." for each in not_measured(facts)]
    return "\n\n".join(parts) + "\n"


def to_markdown(table: Table) -> str:
    """A table as Markdown, with its title and note."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in (table.columns, rule, *table.rows)]
    return "\n".join([f"### {table.title}", "", *lines, *(["", table.note] if table.note else [])])


def _headline(facts: Facts) -> Table:
    rows: list[list[str]] = []
    ours: set[int] = set()
    for k in compressions(facts):
        margin, target = lead_db(facts, k), MARGIN_TARGETS_DB.get(k)
        for arm in (baseline(k), regen(k)):
            if (found := facts["arms"].get(arm.name)) is None:
                continue
            is_ours = arm.kind == "regen"
            if is_ours:
                ours.add(len(rows))
            end = _against(margin, target) if is_ours else ["", "", ""]
            rows.append([found["label"], *_quality(found["measures"][TRAINED]["1"]), *end, _paper(k, is_ours)])
    columns = ["one step, training resolution", *_MEASURES, "over the baseline", "target", "", "paper, MCL-JCV / DAVIS"]
    note = (
        "The baseline is MAGVIT-v2's decoder as it was published; the next table has it with our linear code, too. "
        "PSNR is the mean over stretches; the frames that whole clips of k + 1 cover differ a little between k. The "
        "paper's figures are of other videos, models and sizes: what compares is the margin."
    )
    return Table("REGEN beside the baseline", columns, rows, note, frozenset(ours))


def _linear_code(facts: Facts) -> Table:
    """Who leads where neither has the linear code, and where both have it."""
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
    return Table("What the linear code does", columns, rows, note)


def _paper_form(facts: Facts) -> Table:
    """What local convolutions in the decoder add, with and without the linear code."""
    rows = []
    for k in compressions(facts):
        pairs = ((paper_form(k).name, regen(k).name), (paper_form_alone(k).name, regen_alone(k).name))
        if any(name in facts["arms"] for name, _ in pairs):
            cells = (
                (_db(psnr_db(facts, paper)), _db(psnr_db(facts, ours)), _signed(margin_db(facts, ours, paper)))
                for paper, ours in pairs
            )
            rows.append([f"{k}", *(cell for pair in cells for cell in pair)])
    columns = [
        "k", "paper's decoder, with the code", "ours", "gain", "paper's decoder, without", "ours", "gain",
    ]  # fmt: skip
    return Table("What local convolutions do", columns, rows, "One-step PSNR in dB, training resolution.")


def _against(margin: float | None, target: float | None) -> list[str]:
    if margin is None:
        return ["", "" if target is None else f"≥ {target:+.1f}", ""]
    verdict = "" if target is None else MET if margin >= target else MISSED
    return [f"{margin:+.2f} dB", "" if target is None else f"≥ {target:+.1f} dB", verdict]


def _paper(k: int, ours: bool) -> str:
    figures = [PAPER_DB[name].get(k) for name in ("MCL-JCV", "DAVIS")]
    return " / ".join(f"{pair[ours]:.2f}" for pair in figures if pair is not None)


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
    return Table("More steps, training resolution", ["decoder", "steps", *_MEASURES], rows)


def _sizes(facts: Facts) -> Table:
    shown = {name: f"{size['crop'][0]}×{size['crop'][1]}" for name, size in facts["sizes"].items()}
    rows = [
        [arm["label"], f"{name}, {shown[name]}", *_quality(arm["measures"][name]["1"])]
        for arm in facts["arms"].values()
        for name in _SIZES
    ]
    return Table("Sizes that were never trained on, one step", ["decoder", "size", *_MEASURES], rows)


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
    return Table(f"Variants at k = {ABLATED}, one step", columns, rows, _in_context(facts))


def _in_context(facts: Facts) -> str:
    margin = margin_db(facts, CONTENT_AWARE, IN_CONTEXT, DOUBLE)
    if margin is None:
        return ""
    shown, target, verdict = _against(margin, IN_CONTEXT_TARGET_DB)
    return (
        f"Content-aware positions over latents in context, at twice the training resolution: {shown}, the target is "
        f"{target} {verdict} (the paper: +6.02 dB)."
    )


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
    return Table("Between frames", columns, [row for row in rows if row[1] != "0"], note)


def _cost(facts: Facts) -> Table:
    columns = [
        "decoder", "learning rate", "steps", "core seconds", "seconds by the clock", "training TFLOP", "parameters",
        "GFLOP to decode a clip",
    ]  # fmt: skip
    return Table("What each arm took", columns, list(_cost_rows(facts)), _tuning(facts))


def _cost_rows(facts: Facts) -> Iterator[list[str]]:
    for arm in facts["arms"].values():
        training = arm["training"]
        parameters = sum(training["parameters"].values())
        yield [
            arm["label"], f"{training['lr']:.2g}", f"{training['steps']}", f"{training['cpu_seconds']:.0f}",
            f"{training['seconds']:.0f}", f"{training['flops'] / 1e12:.1f}", f"{parameters / 1e6:.2f} M",
            f"{training['decode_flops'] / 1e9:.2f}",
        ]  # fmt: skip


def _tuning(facts: Facts) -> str:
    """How the learning rates were come by."""
    told = [f"{kind} {found['lr']:.2g}{_tried(found)}" for kind, found in facts["tuning"].items()]
    return f"Learning rates: {'; '.join(told)}."


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
    """What could not be measured, and why."""
    return [
        f"{arm['label']}, {size}: {note}"
        for arm in facts["arms"].values()
        for size in _SIZES
        for note in arm["measures"][size]["1"]["notes"]
    ]
