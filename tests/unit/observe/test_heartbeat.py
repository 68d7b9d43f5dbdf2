"""Heartbeats as files, the clock that does not count a suspension, and who is named as the one that others wait for."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from regen_dist.observe.hang_detector import describe_hang, find_blocking_ranks
from regen_dist.observe.heartbeat import (
    FIRST_MARK,
    AwakeClock,
    Beat,
    Heartbeats,
    Seen,
    beat_path,
    host_and_namespace,
    next_mark,
    parse_beat,
    process_state,
    write_beat,
)

STALE_S = 10.0


def beat(rank: int = 0, step: int | None = 34, phase: str = "forward", place: int = 1, **changes: Any) -> Beat:
    made = Beat(
        rank=rank, host=f"node{rank}", namespace="n", pid=100 + rank, step=step, begun=step or 0, place=place,
        phase=phase, left="", why="", stood_s=12.0, number=1, written=0.0,
    )  # fmt: skip
    return replace(made, **changes)


def seen(rank: int, quiet_s: float = 0.0, **changes: Any) -> Seen:
    return Seen(rank, beat(rank, **changes), quiet_s)


def ended(rank: int, why: str = "", **changes: Any) -> Seen:
    return Seen(rank, beat(rank, **changes).ending(why), 99.0)


def test_a_place_counts_the_phases_of_a_step() -> None:
    """A phase that is marked again keeps its place, another step begins at 0, no step means the one before."""
    marks = [FIRST_MARK]
    for phase, step in (("build", None), ("data", 1), ("forward", None), ("forward", 1), ("data", 1), ("data", 2)):
        marks.append(next_mark(marks[-1], phase, step))
    assert [mark[:2] for mark in marks] == [(None, 0), (None, 1), (1, 0), (1, 1), (1, 1), (1, 2), (2, 0)]
    assert [mark[3] for mark in marks] == [0, 0, 1, 1, 1, 1, 2], "steps begun in this start"
    assert all(before is not after for before, after in pairwise(marks)), "or a repeated mark would not count as one"


def test_a_heartbeat_reads_back_and_leaves_no_other_file(tmp_path: Path) -> None:
    for each in (beat(), beat(step=None), beat().ending(""), beat().ending("DataError: no such file")):
        write_beat(tmp_path, each)
        assert parse_beat(beat_path(tmp_path, 0).read_text()) == each
    assert os.listdir(tmp_path / "heartbeats") == ["rank-00000.json"]


def test_an_ending_keeps_the_phase_that_was_left() -> None:
    assert (beat().ending("").phase, beat().ending("").last_phase) == ("ended", beat().last_phase)
    assert (beat().ending("E: x").phase, beat().ending("E: x").last_phase) == ("failed", beat().last_phase)
    assert (beat(phase="ended").state, beat().ending("").state) == ("running", "ended"), "a phase may be called so"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"rank": 1}'])
def test_what_is_no_heartbeat_is_none(text: str) -> None:
    assert parse_beat(text) is None


def test_only_a_file_that_was_seen_unchanged_is_quiet(tmp_path: Path) -> None:
    """The times in the file and of the file are not believed."""
    heartbeats = Heartbeats(tmp_path)
    assert heartbeats.read(0, now=5.0) == Seen(0, None, 0.0)
    assert heartbeats.read(0, now=9.0) == Seen(0, None, 4.0)
    write_beat(tmp_path, beat(number=1))
    os.utime(beat_path(tmp_path, 0), (0, 0))
    assert heartbeats.read(0, now=10.0).quiet_s == 0.0
    assert heartbeats.read(0, now=30.0).quiet_s == 20.0
    write_beat(tmp_path, beat(number=2))
    assert heartbeats.read(0, now=31.0).quiet_s == 0.0


def test_a_suspended_process_does_not_count_the_time() -> None:
    times = iter([0.0, 1.0, 3601.0, 3602.0])
    clock = AwakeClock(7.0, lambda: next(times))
    assert [clock.read() for _ in range(3)] == [1.0, 8.0, 9.0]


def test_a_process_is_known_on_its_own_host_alone() -> None:
    host, namespace = host_and_namespace()
    own = beat(host=host, namespace=namespace, pid=os.getpid())
    assert process_state(own) in {"R", "S"}
    assert process_state(replace(own, pid=2**30)) == "", "there can be no such process"
    assert process_state(replace(own, host="elsewhere")) is None
    assert process_state(replace(own, namespace="a container's")) is None


@pytest.mark.parametrize(
    ("ranks", "kind", "culprits"),
    [
        ([seen(0), seen(1)], "together", [0, 1]),
        ([seen(0)], "together", [0]),
        ([seen(0), seen(1, phase="data", place=0)], "behind", [1]),
        ([seen(0, phase="data", place=0), seen(1), seen(2)], "behind", [0]),
        ([seen(0, step=35, place=0), seen(1, place=4)], "behind", [1]),
        ([seen(0, step=1, place=0), seen(1, step=None, place=3)], "behind", [1]),
        ([seen(0, step=None), seen(1, step=None)], "together", [0, 1]),
        ([seen(0, phase="save", place=4), seen(1, phase="save", place=3)], "together", [0, 1]),  # 0 also logs
        ([seen(0, step=30, begun=41), seen(1, step=40, begun=40, phase="go back")], "behind", [1]),  # a rollback
        ([seen(0), seen(1, quiet_s=11.0)], "quiet", [1]),
        ([seen(0), seen(1, quiet_s=9.0)], "together", [0, 1]),
        ([seen(0, phase="data", place=0), seen(1, quiet_s=11.0)], "quiet", [1]),  # only just stopped there, perhaps
        ([seen(0), Seen(1, None, 11.0)], "quiet", [1]),
        ([seen(0), Seen(1, None, 1.0)], "together", [0]),
        ([seen(0), seen(1, quiet_s=11.0), ended(2, "ValueError: x")], "failed", [2]),
        ([seen(0), ended(1, step=30)], "behind", [1]),  # ended too early: the ranks disagree
        ([ended(0), seen(1)], "behind", [1]),  # 0 is done, 1 hangs at its end
        ([ended(0, place=2), seen(1, place=5)], "behind", [1]),
        ([ended(0), seen(1), seen(2, phase="data", place=0)], "behind", [2]),
    ],
)
def test_who_is_waited_for(ranks: list[Seen], kind: str, culprits: list[int]) -> None:
    finding = find_blocking_ranks(ranks, STALE_S)
    assert (finding.kind, [each.rank for each in finding.ranks]) == (kind, culprits)


def _told(*ranks: Seen, world_size: int = 0, state: str | None = None) -> str:
    return describe_hang(find_blocking_ranks(ranks, STALE_S), world_size or len(ranks), 12.0, lambda _: state)


def test_the_words_for_one_that_is_behind() -> None:
    assert _told(seen(0), seen(1, phase="data", place=0)) == (
        "rank 1 on node1 (process 101) has stood still for 12 s in phase 'data' of step 34; the other ranks wait"
    )
    assert _told(seen(0, step=1), seen(1, step=None, phase="build", stood_s=20.0)) == (
        "rank 1 on node1 (process 101) has stood still for 20 s in phase 'build' before the first step; "
        "the other ranks wait"
    )


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("T", "its process is stopped (SIGSTOP"),
        ("", "its process is gone: killed"),
        ("D", "waits in the kernel"),
        ("R", "its interpreter is blocked"),
        (None, "no heartbeat for 11 s, so it is stopped, dead, cut off"),
    ],
)
def test_the_words_for_one_without_a_heartbeat(state: str | None, words: str) -> None:
    text = _told(seen(0), seen(1, quiet_s=11.0), state=state)
    where = "in phase 'forward' of step 34 by its last heartbeat: "
    assert text.startswith(f"rank 1 on node1 (process 101) has stood still for 12 s {where}")
    assert words in text


def test_the_words_for_many_and_for_all() -> None:
    behind = [seen(rank, phase="data", place=0) for rank in range(1, 20)]
    assert _told(seen(0), *behind).startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more, first of them rank 1 on node1")
    assert _told(seen(0), seen(1)) == "all 2 ranks have stood still for 12 s in phase 'forward' of step 34"
    assert "before the first heartbeat: it has not begun" in _told(seen(0), Seen(1, None, 11.0))
    assert "of step 34: it ended with ValueError: x; the other" in _told(seen(0), ended(1, "ValueError: x"))
    assert "of step 30: it has ended, the others have not" in _told(seen(0), ended(1, step=30))


def test_a_mark_costs_next_to_nothing() -> None:
    """So that the loop may mark whatever it likes: several marks in a step of milliseconds are nothing."""
    from regen_dist.config.run import HangConfig
    from regen_dist.observe.hang_detector import Watchdog

    watchdog, best = Watchdog(Path("unused"), 0, 1, HangConfig()), float("inf")
    for step in range(50):
        began = time.perf_counter()
        for _ in range(100):
            watchdog.mark("data", step)
            watchdog.mark("forward", step)
        best = min(best, (time.perf_counter() - began) / 200)
    assert best < 1e-5, "seconds, on a slow machine; a write to a file would take many times that"
