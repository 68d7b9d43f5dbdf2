"""`regen bench checkpoint`: objects left in a store, and figures, ratios and tables of measured rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from regen_dist.observe.record import Record, read_record
from tools.bench.checkpoint import Round, cases_section, place, sections, state_section, table, training_section
from tools.bench.checkpoint_cases import Save, Saving, saving

Lines = list[dict[str, Any]]


def record(
    steps: int, every: int, *, still_s: float, writing_s: float, slower_s: float = 0.0, wait: bool = False
) -> Lines:
    """The record of a run whose undisturbed steps take 1 s, and whose saves stand `still_s` and are written for
    `writing_s` after that. A step that begins while one is written takes `slower_s` more."""
    return list(_lines(steps, every, still_s, writing_s, slower_s, wait))


def _lines(
    steps: int, every: int, still_s: float, writing_s: float, slower_s: float, wait: bool
) -> Iterator[dict[str, Any]]:
    now, committed = 0.0, -1.0
    for step in range(1, steps + 1):
        step_s = 1.0 + slower_s * (now < committed)
        now += step_s
        yield {"kind": "train", "step": step, "step_s": step_s, "time": now}
        if step % every == 0 or step == steps:
            figures = {"blocked_s": still_s / 2, "seconds": still_s + writing_s, "bytes": 1600, "problem": None}
            committed = now + still_s + writing_s
            now += still_s + writing_s * wait
            yield {"kind": "checkpoint", "step": step, **figures, "time": now}


def test_the_clock_says_how_long_a_save_stood_still() -> None:
    """The first save makes the buffers and the last is waited for: of four, two are judged."""
    found = saving(record(16, 4, still_s=0.2, writing_s=1.5, slower_s=0.25))
    assert [save.step for save in found.saves] == [8, 12]
    assert [save.still_s for save in found.saves] == pytest.approx([0.2, 0.2])
    assert found.first_blocked_s == pytest.approx(0.1)


def test_steps_that_a_write_overlaps_are_beside_it_and_not_undisturbed() -> None:
    """1.5 s of writing reach into the second step of 1.25 s: two steps, each a quarter of a second longer."""
    found = saving(record(16, 4, still_s=0.2, writing_s=1.5, slower_s=0.25))
    assert [save.beside for save in found.saves] == [2, 2]
    assert set(found.quiet_s) == {1.0}
    assert len(found.quiet_s) == 16 - 2 - 3 * 2, "all but the first two, and two after each save but the last"
    assert [found.lost_s(save) for save in found.saves] == pytest.approx([0.5, 0.5])
    assert [found.cost_s(save) for save in found.saves] == pytest.approx([0.7, 0.7])


def test_a_save_that_is_waited_for_has_no_step_beside_it() -> None:
    found = saving(record(16, 4, still_s=0.2, writing_s=1.5, wait=True))
    assert [save.beside for save in found.saves] == [0, 0]
    assert [found.cost_s(save) for save in found.saves] == pytest.approx([1.7, 1.7])


def test_what_cannot_be_judged_is_an_error() -> None:
    """Too few saves, no undisturbed step, a save that failed."""
    with pytest.raises(DataError, match=r"8 steps with 2 saves .* Raise train\.steps"):
        saving(record(8, 4, still_s=0.2, writing_s=0.5))
    with pytest.raises(DataError, match="some steps must be undisturbed"):
        saving(record(9, 1, still_s=0.2, writing_s=0.5))
    lines = record(16, 4, still_s=0.2, writing_s=0.5)
    lines[4]["problem"] = "disk full"
    with pytest.raises(DataError, match="disk full"):
        saving(lines)


def test_a_run_writes_what_is_read(tmp_path: Any) -> None:
    """Through the run's own record, with the lines of other kinds that it has."""
    record_of_run = Record(tmp_path / "metrics.jsonl", 0)
    for line in record(12, 4, still_s=0.0, writing_s=0.0):
        record_of_run.write(
            line["kind"], line["step"], {k: v for k, v in line.items() if k not in ("kind", "step", "time")}
        )
    record_of_run.write("event", 12, {"event": "done"})
    record_of_run.close()
    assert [save.step for save in saving(read_record(tmp_path / "metrics.jsonl")).saves] == [8]


def test_standing_still_is_held_against_a_share_of_a_step_and_one_copy() -> None:
    """0.2 s of 1 s, where 0.05 s and a copy of 0.15 s (0.05 s in the second round) are allowed."""
    run = saving(record(16, 4, still_s=0.2, writing_s=1.5, slower_s=0.25))
    waited = saving(record(16, 4, still_s=0.2, writing_s=1.5, wait=True))
    found = training_section([run, run], [waited, waited], [0.15, 0.05])
    ours = found["asynchronous"]
    assert ours["still_of_step"]["values"] == pytest.approx([0.2] * 4)
    assert ours["allowed_of_step"]["values"] == pytest.approx([0.2, 0.1])
    assert ours["still_of_allowed"]["values"] == pytest.approx([1, 1, 2, 2])
    assert ours["step_beside_of_step"]["median"] == pytest.approx(1.25)
    assert ours["cost_of_step"]["median"] == pytest.approx(0.7)
    assert found["synchronous"]["cost_of_step"]["median"] == pytest.approx(1.7)
    assert found["asynchronous_of_synchronous"]["values"] == pytest.approx([0.7 / 1.7] * 2)


def test_writing_that_overlaps_no_step_slows_none() -> None:
    """A write that ends before the next step begins."""
    quick = Saving([1.0], saving(record(16, 4, still_s=0.2, writing_s=0.0)).saves, 0.1)
    assert training_section([quick], [quick], [0.1])["asynchronous"]["step_beside_of_step"]["values"] == [1.0]


def turns(*seconds: float, size: int = 100, **facts: float) -> list[dict[str, Any]]:
    return [{"amount": size, "seconds": each, "facts": facts} for each in seconds]


SAVES = {"bare copy": turns(1, 10), "plain files": turns(2, 20), "ours": turns(3, 30, size=110, sync_s=0.5)}
LOADS = {
    "plain reads": turns(1, 10),
    "ours": turns(2, 20),
    "ours, from choosing to loaded, sizes compared": turns(2.5, 25),
    "ours, from choosing to loaded, checksums verified": turns(3, 30),
}
BUCKET = {"bucket: plain objects": turns(5, 50), "bucket: ours": turns(10, 100)}


def test_each_way_is_held_against_plain_files_within_a_round() -> None:
    """A machine that becomes ten times slower changes no ratio; a bucket's are against the bucket's own."""
    found = cases_section("save", SAVES | BUCKET)
    assert {name: ratio["values"] for name, ratio in found["ratios"].items()} == {
        "bare copy": [0.5, 0.5], "ours": [1.5, 1.5], "bucket: ours": [2.0, 2.0],
    }  # fmt: skip
    assert found["cases"]["ours"]["bytes"] == 110
    assert found["cases"]["ours"]["sync_s"]["median"] == 0.5
    assert found["cases"]["ours"]["seconds"]["values"] == [3, 30]


def test_what_checksums_add_is_the_difference_within_a_round() -> None:
    assert cases_section("load", LOADS)["checksums_add_s"]["values"] == [0.5, 5]


def test_the_state_is_sixteen_bytes_a_parameter() -> None:
    assert state_section(100, 1616, 2) == {
        "parameters": 100, "state_bytes": 1600, "written_bytes": 1616, "files": 2, "ratio": 1.01,
    }  # fmt: skip


def rows(text: str) -> dict[str, Sequence[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in rest] for name, *rest in lines}


def test_the_table_has_a_row_for_everything() -> None:
    run = saving(record(16, 4, still_s=0.2, writing_s=1.5, slower_s=0.25))
    waited = saving(record(16, 4, still_s=0.2, writing_s=1.5, wait=True))
    facts = {
        "ranks": 2,
        "state": state_section(1_000_000, 16_160_000, 2),
        "training": training_section([run], [waited], [0.15]),
        "save": cases_section("save", SAVES),
        "load": {"2": cases_section("load", LOADS), "1": cases_section("load", LOADS)},
    }
    text = table(facts)
    found = rows(text)
    assert found["asynchronous save: training stands still"] == [
        "0.200 s", "20.0% (20.0% to 20.0%) of a step", "≤ 20.0% of a step (5% and one copy)",
    ]  # fmt: skip
    assert found["… beside what the target allows"][1:] == ["1.00 (1.00 to 1.00)", "≤ 1"]
    assert found["synchronous save: all that it costs the run"][0] == "1.700 s"
    assert found["bytes written, for a state of 16 MB (16 bytes a parameter)"][:2] == ["16.2 MB", "1.0100"]
    assert found["saving by 2 ranks: ours"] == ["16.500 s, 0 MB; syncing then takes 0.500 s", "1.50 (1.50 to 1.50)", ""]
    assert found["loading by 1 rank(s): verifying checksums adds"][0] == "2.750 s"
    assert {len(cells) for cells in found.values()} == {3}
    assert "- DeepSpeed: without the moving average" in text


# The rounds of `regen bench checkpoint`: what they leave in a store, and how their figures come together.


def test_a_store_that_was_given_is_left_as_it_was(tmp_path: Path) -> None:
    """Even when the block fails; what others keep there is not touched, and two benches do not meet."""
    Store(tmp_path).put("theirs/object", b"kept")
    with place(str(tmp_path), bucket=True) as first, place(str(tmp_path), bucket=True) as second:
        assert first.url != second.url
    with pytest.raises(KeyError), place(str(tmp_path), bucket=True) as there:  # noqa: PT012 - it must fail inside
        assert there.url is not None
        Store(there.url).put("step-00000001/manifest.json", b"ours")
        raise KeyError
    assert Store(tmp_path).list() == {"theirs/object": 4}


def test_without_a_bucket_there_is_none() -> None:
    with place("s3://never/asked", bucket=False) as there:
        assert (there.url, there.described) == (None, "none")


def _turns(*seconds: float) -> list[dict[str, Any]]:
    return [{"amount": 160, "seconds": each, "facts": {}} for each in seconds]


def _round(scale: float, *, alike: bool = True) -> Round:
    """A round in which everything takes `scale` times as long."""
    save = {
        "bare copy": _turns(scale, 3 * scale),
        "plain files": _turns(scale, scale),
        "ours": _turns(2 * scale, scale),
    }
    whole = "ours, from choosing to loaded, "
    names = ("plain reads", "ours", f"{whole}sizes compared", f"{whole}checksums verified")
    load = {name: _turns(scale, scale) for name in names}
    run = Saving([scale], [Save(5, 0.1 * scale, 0.2 * scale, scale, 160, 1, 1.5 * scale)], scale)
    found = {"parameters": 10, "restored_alike": True, "load": load}
    alone = {**found, "restored_alike": alike, "deepspeed_says": "no"}
    return Round({"asynchronous": run, "synchronous": run}, {2: {**found, "save": save}, 1: alone}, 160, 2, "none")


def test_the_rounds_figures_come_together() -> None:
    """Every turn of every round is there, and the copy that a run is held against is that of its own round."""
    found = sections([_round(1.0), _round(10.0)])
    assert found["save"]["ratios"]["ours"]["values"] == [2, 1, 2, 1]
    assert found["load"].keys() == {"2", "1"}
    assert found["training"]["copy_s"]["values"] == [2, 20]
    assert found["training"]["asynchronous"]["still_of_allowed"]["values"] == pytest.approx([0.2 / 2.05] * 2)
    assert found["state"]["ratio"] == 1.0
    assert (found["restored_alike"], found["deepspeed_elsewhere"]) == (True, "no")


def test_a_load_that_brought_something_else_is_told() -> None:
    assert sections([_round(1.0), _round(1.0, alike=False)])["restored_alike"] is False
