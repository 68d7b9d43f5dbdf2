"""The table of PSNR against training time, out of the records of several budgets."""

from __future__ import annotations

import json
from pathlib import Path

from tools.bench.compression_report import budget_tables, budgets_markdown, read_budgets


def _record(folder: Path, figures: dict[str, float]) -> Path:
    folder.mkdir()
    arms = {name: {"measures": {"training": {"1": {"psnr_db": value}}}} for name, value in figures.items()}
    (folder / "compression.json").write_text(json.dumps({"arms": arms}))
    return folder


def test_a_row_is_an_arm_and_a_column_a_budget(tmp_path: Path) -> None:
    folders = {
        20.0: _record(tmp_path / "long", {"regen-k16": 22.0, "magvit2-k16-linear": 21.25, "regen-k16-paper": 21.0}),
        5.0: _record(tmp_path / "short", {"regen-k16": 21.5, "magvit2-k16-linear": 21.0}),
        60.0: tmp_path / "not there yet",
    }
    budgets = read_budgets(folders)
    assert list(budgets) == [5.0, 20.0]
    (table,) = budget_tables(budgets)
    assert [column.name for column in table.header] == ["k = 16, one-step PSNR dB after", "5 min", "20 min"]
    assert [list(row[1:]) for row in table.rows] == [
        ["21.50", "22.00"],
        ["–", "21.00"],
        ["21.00", "21.25"],
        ["+0.50", "+0.75"],
        ["–", "–"],
    ]
    assert "| lead with the code in both | +0.50 | +0.75 |" in budgets_markdown(budgets)
