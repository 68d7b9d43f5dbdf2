"""PSNR of the arms against their training time, out of the records of several budgets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regen_dist.evaluation.compression.arms import (
    COMPRESSIONS,
    Arm,
    baseline,
    baseline_with_code,
    paper_form,
    paper_form_alone,
    regen,
    regen_alone,
)
from regen_dist.evaluation.compression.leads import Facts, psnr_db
from regen_dist.evaluation.compression.tables import Table, to_markdown

KINDS = (regen, paper_form, baseline_with_code, regen_alone, paper_form_alone, baseline)
Budgets = Mapping[float, Facts]  # minutes of one core an arm, and what compression.json holds


def read_budgets(folders: Mapping[float, Path]) -> dict[float, dict[str, Any]]:
    """The records that are there, by minutes, ascending."""
    files = {minutes: folder / "compression.json" for minutes, folder in sorted(folders.items())}
    return {minutes: json.loads(file.read_text("utf-8")) for minutes, file in files.items() if file.is_file()}


def budget_tables(budgets: Budgets) -> list[Table]:
    """Of each k, a row for each arm that was trained: one-step PSNR at every budget, then the leads with and without
    the linear code in both."""
    return [table for k in COMPRESSIONS if (table := _table(budgets, k)).rows]


def budgets_markdown(budgets: Budgets) -> str:
    """The tables as Markdown."""
    return "\n\n".join(to_markdown(table) for table in budget_tables(budgets)) + "\n"


def _table(budgets: Budgets, k: int) -> Table:
    arms = [kind(k) for kind in KINDS]
    found = {arm: [psnr_db(facts, arm.name) for facts in budgets.values()] for arm in arms}
    rows = [[_label(arm), *map(_db, values)] for arm, values in found.items() if any(v is not None for v in values)]
    if rows:
        rows += [
            ["lead with the code in both", *_leads(found[arms[0]], found[arms[2]])],
            ["lead without it", *_leads(found[arms[3]], found[arms[5]])],
        ]
    columns = [f"k = {k}, one-step PSNR dB after", *(f"{minutes:g} min" for minutes in budgets)]
    return Table(f"k = {k}", columns, rows)


def _label(arm: Arm) -> str:
    kind = "REGEN" if arm.kind == "regen" else "MAGVIT-v2 style baseline"
    return f"{kind}, {arm.what}" if arm.what else f"{kind}, {'with' if arm.has_code else 'without'} the linear code"


def _leads(ours: list[float | None], theirs: list[float | None]) -> list[str]:
    return ["–" if a is None or b is None else f"{a - b:+.2f}" for a, b in zip(ours, theirs, strict=True)]


def _db(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
