"""What the ranks of a run do about a standstill: several monitors in one process, on one clock that a test winds."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from regen_dist.config.run import HangConfig
from regen_dist.errors import HangError
from regen_dist.observe.hang_detector import Monitor, ProgressTimeout, StackFile, Watchdog, is_deputy
from regen_dist.observe.heartbeat import FIRST_MARK, Marked, Seen, beat_path, next_mark, parse_beat

CONFIG = HangConfig(beat_s=1.0, warn_s=20.0, limit_s=60.0, start_limit_s=120.0)


class Ended(Exception):
    """A rank's process is gone."""


class Rank:
    """A rank whose main thread does what the test says, and whose watching thread lives unless the test stops it."""

    def __init__(self, run: Path, rank: int, world_size: int, config: HangConfig = CONFIG, now: float = 0.0) -> None:
        self.said: list[str] = []
        self.dumped: list[str] = []
        self.code: int | None = None
        self.alive = True
        self.mark = FIRST_MARK
        self.monitor = Monitor(
            run, rank, world_size, config, print_line=self.said.append, dump=self.dumped.append, end=self._end, now=now
        )

    def _end(self, code: int) -> None:
        self.code, self.alive = code, False
        raise Ended

    def at(self, phase: str, step: int | None) -> None:
        self.mark = next_mark(self.mark, phase, step)


class Run:
    """All ranks of a run, second by second."""

    def __init__(self, folder: Path, world_size: int, config: HangConfig = CONFIG) -> None:
        self.now = 0.0
        self.ranks = [Rank(folder, rank, world_size, config) for rank in range(world_size)]

    def go(self, seconds: float, each_second: Callable[[], None] = lambda: None) -> None:
        for _ in range(round(seconds)):
            self.now += 1.0
            each_second()
            for rank in self.ranks:
                if rank.alive:
                    try:
                        rank.monitor.tick(self.now, rank.mark)
                    except Ended:
                        continue

    def train(self, first: int, last: int) -> None:
        """Steps of two seconds, on every rank that lives."""
        for step in range(first, last + 1):
            for phase in ("data", "forward"):
                for rank in self.ranks:
                    if rank.alive:
                        rank.at(phase, step)
                self.go(1)

    @property
    def said(self) -> list[list[str]]:
        return [rank.said for rank in self.ranks]

    @property
    def codes(self) -> list[int | None]:
        return [rank.code for rank in self.ranks]


def _hold(run: Run, culprit: int) -> None:
    """One rank stays in the data phase of step 34, the others wait in the next phase."""
    run.train(30, 33)
    for rank, each in enumerate(run.ranks):
        each.at("data", 34)
        if rank != culprit:
            each.at("forward", 34)


def test_a_run_that_works_says_nothing_and_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank writes its own file alone."""
    run = Run(tmp_path, 3)
    monkeypatch.setattr("regen_dist.observe.heartbeat.Heartbeats.read", lambda *_: pytest.fail("it read"))
    monkeypatch.setattr("regen_dist.observe.hang_detector.read_text", lambda *_: pytest.fail("it read"))
    run.train(1, 100)
    assert run.said == [[], [], []]
    beats = [parse_beat(beat_path(tmp_path, rank).read_text()) for rank in range(3)]
    assert [beat and (beat.rank, beat.step, beat.phase) for beat in beats] == [(r, 100, "forward") for r in range(3)]
    assert sorted(os.listdir(tmp_path)) == ["heartbeats"]


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_slow_rank_is_one_warning_by_rank_0(culprit: int, tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    _hold(run, culprit)
    run.go(19)
    assert run.said == [[], [], []]
    run.go(30)
    assert run.said[1:] == [[], []]
    (warning,) = run.said[0]
    assert warning.startswith(f"warning: rank {culprit} on ")
    assert "has stood still for 20 s in phase 'data' of step 34; the other ranks wait; the run is ended if" in warning
    assert warning.endswith("nothing moves for 40 s")
    run.train(35, 50)
    assert run.codes == [None] * 3
    assert run.said[0][1:] == ["the run goes on after it stood still for 49 s"]
    _hold(run, culprit)
    run.go(21)
    assert len(run.said[0]) == 3, "another standstill is another warning"


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_at_the_limit_every_rank_dumps_and_ends_and_one_speaks(culprit: int, tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    _hold(run, culprit)
    run.go(66)
    assert run.codes == [HangError.exit_code] * 3 == [7] * 3
    verdicts = [line for lines in run.said for line in lines if line.startswith("error: ")]
    assert len(verdicts) == 1
    assert f"rank {culprit} on " in verdicts[0]
    assert "in phase 'data' of step 34" in verdicts[0]
    assert "guards.hang.limit_s (now 60)" in verdicts[0]
    assert [len(rank.dumped) for rank in run.ranks] == [1, 1, 1]
    told = json.loads((tmp_path / "hang.json").read_text())
    assert (told["message"], told["kind"], told["by"]) == (verdicts[0].removeprefix("error: "), "behind", 0)
    assert [(each["rank"], each["phase"], each["step"]) for each in told["ranks"]] == [(culprit, "data", 34)]


@pytest.mark.parametrize("stopped", [[0], [1], [0, 1], [0, 1, 2], [1, 3]])
def test_ranks_without_a_heartbeat_are_named_by_the_lowest_that_lives(stopped: list[int], tmp_path: Path) -> None:
    run = Run(tmp_path, 5)
    run.train(1, 10)
    for rank in stopped:
        run.ranks[rank].alive = False
    for rank in run.ranks:
        rank.at("forward", 11) if rank.alive else None
    run.go(66)
    speaker = min(set(range(5)) - set(stopped))
    assert [len(lines) for lines in run.said] == [2 * (rank == speaker) for rank in range(5)]
    assert run.codes == [None if rank in stopped else 7 for rank in range(5)]
    told = json.loads((tmp_path / "hang.json").read_text())
    assert (told["kind"], [each["rank"] for each in told["ranks"]]) == ("quiet", stopped)
    assert {each["phase"] for each in told["ranks"]} == {"forward"}
    assert {each["step"] for each in told["ranks"]} == {10}


def test_a_rank_that_failed_is_named_with_its_error(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.train(1, 3)
    run.ranks[1].alive = False
    run.ranks[1].monitor.close(run.ranks[1].mark, "DataError: no such shard")
    run.go(66)
    assert "rank 1" in run.said[0][-1]
    assert "in phase 'forward' of step 3: it ended with DataError: no such shard" in run.said[0][-1]


def _noting(looks: set[int], rank: int, look: Callable[..., list[Seen]]) -> Callable[..., list[Seen]]:
    def noted(now: float, mark: Marked) -> list[Seen]:
        looks.add(rank)
        return look(now, mark)

    return noted


def test_of_hundreds_of_ranks_few_look_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with every one of those few dead the run still ends, at most two stale heartbeats later."""
    assert [rank for rank in range(512) if is_deputy(rank)] == [*range(8), 8, 16, 32, 64, 128, 256]
    run = Run(tmp_path, 12)
    looks: set[int] = set()
    for rank, each in enumerate(run.ranks):
        look = each.monitor._read_heartbeats

        def watched(
            now: float, mark: Marked, rank: int = rank, look: Callable[..., list[object]] = look
        ) -> list[object]:
            looks.add(rank)
            return look(now, mark)

        monkeypatch.setattr(each.monitor, "_read_heartbeats", watched)
    _hold(run, 11)
    run.go(50)
    assert looks == set(range(9))
    for rank in range(9):
        run.ranks[rank].alive = False
    run.go(10 + 8 + 5)
    assert run.codes == [None] * 9 + [7] * 3
    told = json.loads((tmp_path / "hang.json").read_text())
    assert [each["rank"] for each in told["ranks"]] == list(range(9))


def test_a_rank_that_waits_longer_than_rank_0_does_not_wait_for_it(tmp_path: Path) -> None:
    """Rank 0 goes on marking; rank 1 alone has stood still: it speaks itself, at its own limit."""
    run = Run(tmp_path, 2)
    run.train(1, 10)
    run.go(66, lambda: run.ranks[0].at("retry", 11))
    assert run.codes == [None, 7]
    assert "rank 1 on " in run.said[1][-1]
    run.go(6)
    assert run.codes == [7, 7], "rank 0 stands still for two heartbeats, and sees what was found"
    assert run.said[0] == [run.said[1][-1]]


def test_the_start_may_take_longer_and_lasts_until_the_first_step_is_over() -> None:
    stand = ProgressTimeout(CONFIG, 0.0)
    mark, limits = FIRST_MARK, []
    for phase, step in (("build", None), ("data", 7), ("forward", 7), ("data", 8), ("save", 8)):
        mark = next_mark(mark, phase, step)
        stand.see(0.0, mark)
        limits.append((stand.limit_s, stand.warn_s, stand.limit_key.rpartition(".")[2]))
    assert limits == [(120.0, 40.0, "start_limit_s")] * 3 + [(60.0, 20.0, "limit_s")] * 2


def test_a_rank_that_never_begins_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    run.ranks[2].alive = False
    run.go(126)
    assert run.codes == [7, 7, None]
    assert "rank 2 has stood still for 120 s before the first heartbeat: it has not begun" in run.said[0][-1]
    assert "guards.hang.start_limit_s (now 120)" in run.said[0][-1]


def test_what_an_earlier_start_left_is_not_believed(tmp_path: Path) -> None:
    """Its verdict is put away by rank 0, and known as old by ranks that begin before rank 0; its files are removed."""
    _hold(first := Run(tmp_path, 3), 1)
    first.go(70)
    assert first.codes == [7, 7, 7]
    early = Rank(tmp_path, 1, 2, now=0.0)
    for now in range(10):
        early.monitor.tick(float(now), early.mark)
    assert (early.code, early.said, early.monitor.reported_hang()) == (None, [], "")
    Rank(tmp_path, 0, 2)
    assert os.listdir(tmp_path / "heartbeats") == []
    assert sorted(os.listdir(tmp_path)) == ["hang-previous.json", "heartbeats"]
    early.monitor.tick(20.0, early.mark)
    assert os.listdir(tmp_path / "heartbeats") == ["rank-00001.json"]


def test_a_heartbeat_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    """The run goes on; and heartbeats do too when the disk works again."""
    run = Run(tmp_path, 1)
    (tmp_path / "heartbeats").write_text("in the way")
    run.train(1, 20)
    assert len(run.said[0]) == 1
    assert run.said[0][0].startswith("warning: rank 0 cannot write its heartbeat and goes on without: ")
    (tmp_path / "heartbeats").unlink()
    run.train(21, 22)
    assert beat_path(tmp_path, 0).exists()


def _watchdog(run: Path) -> Watchdog:
    return Watchdog(run, 0, 1, HangConfig(beat_s=0.02))


def _last(run: Path) -> tuple[str, int | None, str, str]:
    beat = parse_beat(beat_path(run, 0).read_text())
    assert beat is not None
    return beat.phase, beat.step, beat.left, beat.why


def test_a_clean_end_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    threads = threading.active_count()
    with _watchdog(tmp_path) as watchdog:
        watchdog.mark("save", 3)
        assert threading.active_count() == threads + 2
    assert threading.active_count() == threads
    assert _last(tmp_path) == ("ended", 3, "save", "")
    assert os.listdir(tmp_path / "heartbeats") == ["rank-00000.json"]
    assert os.listdir(tmp_path / "stacks") == []


@pytest.mark.parametrize(
    ("error", "phase", "why"),
    [
        (ValueError("no such thing\nat all"), "failed", "ValueError: no such thing"),
        (SystemExit(75), "ended", ""),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt: "),
    ],
)
def test_an_error_passes_and_is_in_the_last_heartbeat(
    error: BaseException, phase: str, why: str, tmp_path: Path
) -> None:
    def work() -> None:
        with _watchdog(tmp_path) as watchdog:
            watchdog.mark("data", 3)
            raise error

    with pytest.raises(type(error)):
        work()
    assert _last(tmp_path) == (phase, 3, "data", why)


def test_an_error_after_a_verdict_is_the_hang(tmp_path: Path) -> None:
    """The collectives of a run fail when its ranks end: that is not what anybody should look for."""

    def work() -> None:
        with _watchdog(tmp_path):
            (tmp_path / "hang.json").write_text(json.dumps({"message": "rank 1 has stood still"}))
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(HangError, match="because of a hang: rank 1 has stood still") as caught:
        work()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_folder_that_goes_away_does_not_end_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with _watchdog(run) as watchdog:
        watchdog.mark("data", 1)
        run.rename(tmp_path / "elsewhere")
        run.write_text("in the way")
    assert "rank 0 cannot write its heartbeat" in capfd.readouterr().err


def test_a_full_disk_does_not_keep_a_hang_from_being_ended(tmp_path: Path) -> None:
    """The stacks are lost; the report and the end come all the same."""
    said: list[str] = []
    with Path("/dev/full").open("ab", buffering=0) as full:
        stacks = StackFile(tmp_path / "stacks")
        stacks._file = full
        monitor = Monitor(tmp_path, 0, 1, CONFIG, print_line=said.append, dump=stacks.dump, end=lambda code: None)
        for now in range(round(CONFIG.start_limit_s) + 2):
            monitor.tick(float(now), FIRST_MARK)
    assert "The run is ended" in said[-1]
