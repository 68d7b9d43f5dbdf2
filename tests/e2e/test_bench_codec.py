"""`regen bench codec`: a process for each codec; what cannot be had is a row that says so."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tools.bench.codec import CodecLimits, run
from tools.bench.codec_systems import ClipSize, named_system
from tools.cli import app

SIZE = ClipSize(5, 32, 32)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Of nano, and of a package that is not installed: a folder without it is in its place."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--size", str(SIZE), "--counted", "17x32x32", "--systems", "nano|magvit2", "--repeats", "1"]
    result = CliRunner().invoke(app, ["bench", "codec", "--out", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    assert (folder / "codec.md").read_text() in result.output
    found: dict[str, object] = json.loads((folder / "codec.json").read_text())
    return found


def _row(facts: dict[str, object], system: str, size: ClipSize) -> dict[str, object]:
    rows = facts["rows"]
    assert isinstance(rows, list)
    (row,) = (row for row in rows if row["system"] == system and row["size"] == list(size))
    return row  # type: ignore[no-any-return]


def test_what_a_codec_costs(facts: dict[str, object]) -> None:
    row = _row(facts, "nano", SIZE)
    assert row["latents"] == [[1, 8, 4, 4], [1, 8, 4, 4]]
    assert "problem" not in row
    for call in ("encode", "decode"):
        found = row[call]
        assert isinstance(found, dict)
        assert found["passes"] == 1
        assert found["wall_s"]["min"] > 0 < found["cpu_s"]["min"]
        assert found["peak_bytes"] > 0


def test_what_is_counted_alone_is_not_run(facts: dict[str, object]) -> None:
    row = _row(facts, "nano", ClipSize(17, 32, 32))
    assert row["decode_flops"]
    assert "decode" not in row


def test_what_is_not_installed_says_so(facts: dict[str, object]) -> None:
    for name in ("problem", "not_counted"):
        assert str(_row(facts, "magvit2-pytorch", SIZE)[name]).startswith("not installed: magvit2-pytorch")


def test_a_process_past_its_limits_says_so() -> None:
    """Of time, while it begins; of memory, while it makes its weights."""
    short = CodecLimits(seconds=0.2, gib=8, threads=1, repeats=0, precision="fp32")
    assert run(short.job("measure", named_system("nano"), [SIZE]), short) == [{"problem": "past the limit of 0.2 s"}]
    small = CodecLimits(seconds=120, gib=0.5, threads=1, repeats=0, precision="fp32")
    found = run(small.job("measure", named_system("regen_k8"), [SIZE]), small)
    assert found == [{"size": str(SIZE), "problem": "out of the memory that is allowed"}]
