"""`regen bench codec` and `regen bench compression` at their smallest: a process for each codec, two trained arms."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regen_dist.config import to_yaml
from tests.helpers.ranks import run_regen
from tests.helpers.tiny import tiny_dataset, tiny_run
from tests.helpers.video import moving_square, write_video
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


# `regen bench compression` at its smallest: two arms, trained, measured on videos of our own, and told; then again.


ARMS = {"regen-k4", "magvit2-k4"}
STAGES = [{"channels": 8, "temporal": 2}, {"channels": 16, "spatial": 2, "temporal": 2}]


def test_two_arms_are_trained_measured_and_told(tmp_path: Path) -> None:
    shards, out, tests, log = tiny_dataset(tmp_path), tmp_path / "out", tmp_path / "tests", tmp_path / "log"
    config = tiny_run(url=shards, data__short_side=48, data__validation_url=str(shards), model__encoder__stages=STAGES)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    write_video(tests / "one.mp4", moving_square(36, 96, 128, seed=5))
    (tests / "broken.mp4").write_bytes(b"no video")
    command = [
        "bench", "compression", tmp_path / "config.yaml", f"data.url={shards}", f"data.validation_url={shards}",
        "--out", out, "--tests", tests, "--minutes-per-arm", 0.005, "--arms", "|".join(ARMS), "--no-tune",
    ]  # fmt: skip
    assert run_regen(*command, log=log, timeout_s=240.0) == 0, log.read_text()
    facts = json.loads((out / "compression.json").read_text())
    assert facts["arms"].keys() == ARMS
    assert facts["tests"]["left_out"][0].startswith("broken.mp4")
    for name, arm in facts["arms"].items():
        assert arm["training"]["steps"] == arm["pace"]["steps"] >= 4
        assert arm["measures"]["double"]["1"]["psnr_db"] > 5
        assert set(arm["measures"]["training"]) == ({"1", "2", "4", "8"} if name == "regen-k4" else {"1"})
        assert arm["measures"]["between"]["clips"] == 4
    assert set(facts["margins"]) == {"k = 4"}
    assert "| REGEN, k = 4 |" in (out / "compression.md").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', (out / "index.html").read_text())
    _again(command, out, log)


def _again(command: list[object], out: Path, log: Path) -> None:
    """Nothing is trained or measured a second time."""
    kept = {
        path: path.stat().st_mtime_ns for folder in ("arms", "probes", "measures") for path in (out / folder).rglob("*")
    }
    assert run_regen(*command, log=log, timeout_s=240.0) == 0, log.read_text()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
