"""`regen bench checkpoint` at its smallest: all figures are there and agree with each other. No speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regen_dist.config import to_yaml
from tests.helpers.ranks import run_regen
from tests.helpers.tiny import tiny_model, tiny_run
from tools.bench.checkpoint import STATE_BYTES
from tools.bench.checkpoint import table as checkpoint_table

SAVING = {"bare copy", "plain files", "ours", "torch.distributed.checkpoint", "DeepSpeed"}
LOADING = {"plain reads", "ours", "torch.distributed.checkpoint", "DeepSpeed"}
CHOOSING = {f"ours, from choosing to loaded, {how}" for how in ("sizes compared", "checksums verified")}
BUCKET = {"save": {"bucket: plain objects", "bucket: ours"}, "load": {"bucket: plain gets", "bucket: ours"}}
BASES = {"save": {"plain files", "bucket: plain objects"}, "load": {"plain reads", "bucket: plain gets"}}
ROUNDS, REPEATS = 1, 2


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves behind, at a model whose state is large beside a file's header."""
    folder = tmp_path_factory.mktemp("bench")
    model = tiny_model(decoder__width=128).model_dump(mode="json")
    run = tiny_run(
        model=model, engine__kind="zero3", engine__precision="bf16", train__steps=9, checkpoint__every=3,
        train__batch_global=2,
    )  # fmt: skip
    (folder / "tiny.yaml").write_text(to_yaml(run))
    rounds = (f"--rounds={ROUNDS}", f"--repeats={REPEATS}")
    log = folder / "log"
    code = run_regen(
        "bench", "checkpoint", folder / "tiny.yaml", "--out", folder / "out", *rounds, log=log, timeout_s=280.0
    )
    assert code == 0, log.read_text()
    return folder / "out"


@pytest.fixture(scope="module")
def facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "checkpoint.json").read_text())


def test_only_the_figures_are_left(out: Path, facts: dict[str, Any]) -> None:
    """No run, checkpoint or clip stays, and the table is that of the figures."""
    assert {path.name for path in out.iterdir()} == {"checkpoint.json", "checkpoint.md"}
    assert (out / "checkpoint.md").read_text() == checkpoint_table(facts)


def test_it_says_where_and_with_what_it_was_measured(facts: dict[str, Any]) -> None:
    assert facts["machine"].keys() >= {"device", "cores", "packages"}
    assert len(facts["config_hash"]) == 64
    assert (facts["ranks"], facts["rounds"], facts["repeats"]) == (2, ROUNDS, REPEATS)


def test_the_bytes_written_are_the_state(facts: dict[str, Any]) -> None:
    """Within one percent, by the run's manifest and by the ranks that saved alone; and what the others write."""
    state, saved = facts["state"], {name: case["bytes"] for name, case in facts["save"]["cases"].items()}
    assert state["state_bytes"] == STATE_BYTES * state["parameters"]
    assert state["ratio"] == pytest.approx(1, abs=0.01)
    assert saved["ours"] == pytest.approx(state["written_bytes"], rel=1e-4)
    assert saved["bare copy"] == saved["plain files"] == state["state_bytes"]
    assert saved["torch.distributed.checkpoint"] >= state["state_bytes"]
    assert saved["DeepSpeed"] >= 12 * state["parameters"], "masters and moments"


def test_every_way_has_every_turn_and_a_ratio(facts: dict[str, Any]) -> None:
    sections = {"save": [facts["save"]], "load": list(facts["load"].values())}
    assert facts["save"]["cases"].keys() == SAVING | BUCKET["save"]
    assert facts["load"]["2"]["cases"].keys() == LOADING | CHOOSING | BUCKET["load"]
    assert facts["load"]["1"]["cases"].keys() == (LOADING | CHOOSING | BUCKET["load"]) - {"DeepSpeed"}
    for kind, each in sections.items():
        for section in each:
            assert section["ratios"].keys() == section["cases"].keys() - BASES[kind]
            for case in section["cases"].values():
                assert len(case["seconds"]["values"]) == ROUNDS * REPEATS
                assert 0 < case["seconds"]["min"] <= case["seconds"]["median"] <= case["seconds"]["max"]
                assert case["bytes"] > 0


def test_a_run_tells_what_its_saves_cost(facts: dict[str, Any]) -> None:
    """Of each run of nine steps that saves after the third, sixth and ninth, one save can be judged."""
    training = facts["training"]
    for mode in ("asynchronous", "synchronous"):
        assert len(training[mode]["still_s"]["values"]) == ROUNDS
        blocked, still = training[mode]["blocked_s"]["values"], training[mode]["still_s"]["values"]
        assert all(0 < a < b for a, b in zip(blocked, still, strict=True)), "the copy is a part of standing still"
    waited = training["synchronous"]
    assert all(a <= b for a, b in zip(waited["seconds"]["values"], waited["still_s"]["values"], strict=True))
    assert len(training["step_s"]["values"]) > 2 * ROUNDS
    assert training["asynchronous"]["allowed_of_step"]["min"] > 0.05


def test_every_way_of_loading_brought_back_the_state(facts: dict[str, Any]) -> None:
    """At both numbers of ranks; DeepSpeed refuses the other number, which is what the table says of it."""
    assert facts["restored_alike"] is True
    assert "world size" in facts["deepspeed_elsewhere"]
