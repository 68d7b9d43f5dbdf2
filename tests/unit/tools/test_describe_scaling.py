"""docs/scaling.md and docs/t2v.md quote `regen describe` as it is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tools.cli import app

ROOT = Path(__file__).parents[3]
QUOTED = {
    page: re.findall(r"```text\n\$ regen (describe .*)\n([^`]*)\n```", (ROOT / "docs" / page).read_text())
    for page in ("scaling.md", "t2v.md")
}


def test_the_page_has_a_table_for_each_full_size_model() -> None:
    """Every full-size preset of REGEN and of text to video, on 8, 64 and 512 GPUs."""
    embedders = {str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "embedder").glob("regen_*.yaml")}
    quoted = QUOTED["scaling.md"]
    assert {shlex.split(command)[1] for command, _ in quoted} == {*embedders, "configs/t2v/5b.yaml"}
    assert all("--world-size 8 --world-size 64 --world-size 512" in command for command, _ in quoted)


def test_the_page_on_text_to_video_has_the_shapes_and_the_cost_by_embedder() -> None:
    tables = " ".join(table for _, table in QUOTED["t2v.md"])
    assert {shlex.split(command)[1] for command, _ in QUOTED["t2v.md"]} == {"configs/t2v/5b.yaml"}
    assert "32 blocks x width 3072 x 24 heads" in tables
    assert all(row in tables for row in ("conventional, 4x", "k = 4 ", "k = 8 ", "k = 16 ", "k = 32 "))


@pytest.mark.parametrize(
    ("command", "table"), [each for quoted in QUOTED.values() for each in quoted], ids=lambda text: text.split()[1]
)
def test_tables_of_the_pages_are_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, command: str, table: str
) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, shlex.split(command), env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert table in "\n".join(line.rstrip() for line in result.output.splitlines())
