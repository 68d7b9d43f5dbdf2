"""docs/scaling.md quotes `regen describe` as it is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tools.cli import app

ROOT = Path(__file__).parents[3]
QUOTED = re.findall(r"```text\n\$ regen (.*)\n([^`]*)\n```", (ROOT / "docs" / "scaling.md").read_text())


def test_the_page_has_a_table_for_each_embedder() -> None:
    """Every full-size preset of REGEN, on 8, 64 and 512 GPUs."""
    presets = {str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "embedder").glob("regen_*.yaml")}
    assert {shlex.split(command)[1] for command, _ in QUOTED} == presets
    assert all("--world-size 8 --world-size 64 --world-size 512" in command for command, _ in QUOTED)


@pytest.mark.parametrize(("command", "table"), QUOTED, ids=lambda text: text.split()[1])
def test_tables_of_the_page_are_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, command: str, table: str
) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, shlex.split(command), env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert table in "\n".join(line.rstrip() for line in result.output.splitlines())
