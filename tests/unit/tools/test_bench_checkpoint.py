"""The rounds of `regen bench checkpoint`: what they leave in a store, and how their figures come together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from regen_dist.data.storage.store import Store
from tools.bench.checkpoint import Round, place, sections
from tools.bench.checkpoint_cases import Save, Saving


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
