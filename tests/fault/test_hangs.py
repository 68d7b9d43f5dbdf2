"""Ranks that stand still, as processes of their own: who is named, what is left to look at, and how soon it is over.

The ranks are small, but for those of the last test: they mark their phases, and wait for each other in the phase
"forward" as a collective does, by files. Each has its watchdog, and nothing above them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.supervise import launch
from regen_dist.config.run import HangConfig
from regen_dist.observe.heartbeat import beat_path, parse_beat, read_text
from tests.helpers.machine import runs
from tests.helpers.ranks import start_regen, wait_for_step

CONFIG = HangConfig(beat_s=0.2, warn_s=3.0, limit_s=6.0, start_limit_s=30.0)
# The limit, a moment for a lower rank to speak, a moment for the others to see the verdict; and a machine that is busy.
OVER_S = CONFIG.limit_s + 2 * 1.4 + 6.0

RANK = """
import os, sys, time
from pathlib import Path
from regen_dist.config.run import HangConfig
from regen_dist.observe.hang_detector import Watchdog

rank, run, steps = int(os.environ["RANK"]), Path(os.environ["RUN"]), 1000

def meet(step):
    (run / f"{step}-{rank}").touch()
    while not (run / f"{step}-{1 - rank}").exists():
        time.sleep(0.01)

def held(step): pass
def final(): pass

EXTRA

with Watchdog(run, rank, 2, HangConfig.model_validate_json(os.environ["HANG"])) as watchdog:
    for step in range(1, steps + 1):
        watchdog.mark("data", step)
        held(step)
        time.sleep(0.02)
        watchdog.mark("forward")
        meet(step)
    watchdog.mark("save")
    final()
"""


def _program(extra: str = "") -> list[str]:
    return [sys.executable, "-c", RANK.replace("EXTRA", extra)]


def _environment(run: Path) -> dict[str, str]:
    run.mkdir(exist_ok=True)
    return {**os.environ, "RUN": str(run), "HANG": CONFIG.model_dump_json()}


@contextmanager
def _ranks(run: Path, extra: str = "") -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two ranks; what they print is in RUN/0.log and RUN/1.log."""
    environment, processes = _environment(run), []
    try:
        for rank in range(2):
            with (run / f"{rank}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(_program(extra), env={**environment, "RANK": str(rank)}, stdout=log, stderr=log)
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s"
        time.sleep(0.02)


def _wait_for_a_step(run: Path, rank: int) -> None:
    """Until the rank has written a heartbeat with a step: rank 0 clears away what came before it began."""
    _wait_until(lambda: (beat := parse_beat(read_text(beat_path(run, rank)))) and (beat.step or 0) >= 3)


def _stop_in_a_step(run: Path, rank: int, process: subprocess.Popen[bytes]) -> float:
    """SIGSTOP, after the rank has written a heartbeat with a step; returns when."""
    _wait_for_a_step(run, rank)
    process.send_signal(signal.SIGSTOP)
    return time.monotonic()


def _log(run: Path, rank: int) -> str:
    return (run / f"{rank}.log").read_text()


def _stacks(run: Path, rank: int) -> str:
    return (run / "stacks" / f"rank-{rank:05d}.txt").read_text()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_the_other_ends_the_run(stopped: int, tmp_path: Path) -> None:
    """Also rank 0: no rank is needed to find out. The one that waits leaves its stacks and exit code 7."""
    other = 1 - stopped
    with _ranks(tmp_path) as processes:
        since = _stop_in_a_step(tmp_path, stopped, processes[stopped])
        assert processes[other].wait(OVER_S) == 7
        took_s = time.monotonic() - since
        assert runs(processes[stopped].pid)
    assert CONFIG.limit_s - 2 * CONFIG.beat_s < took_s < OVER_S, "the last heartbeat was a little before"
    told = json.loads((tmp_path / "hang.json").read_text())
    assert (told["kind"], told["by"]) == ("quiet", other)
    (culprit,) = told["ranks"]
    assert (culprit["rank"], culprit["pid"]) == (stopped, processes[stopped].pid)
    assert culprit["phase"] in {"data", "forward"}
    who = f"rank {stopped} on {culprit['host']} (process {culprit['pid']}) has stood still for "
    where = f"in phase '{culprit['phase']}' of step {culprit['step']} by its last heartbeat: its process is stopped"
    assert f"warning: {who}" in _log(tmp_path, other)
    assert f"error: {who}" in _log(tmp_path, other)
    assert _log(tmp_path, other).count(where) == 2
    assert "in meet" in _stacks(tmp_path, other), "where its main thread waits"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_for_a_moment_is_a_warning(stopped: int, tmp_path: Path) -> None:
    with _ranks(tmp_path, "steps = 100") as processes:
        _stop_in_a_step(tmp_path, stopped, processes[stopped])
        _wait_until(lambda: "warning: " in _log(tmp_path, 1 - stopped))
        processes[stopped].send_signal(signal.SIGCONT)
        assert [process.wait(30) for process in processes] == [0, 0]
    log = _log(tmp_path, 0) + _log(tmp_path, 1)
    assert log.count("warning: ") == 1
    assert f"warning: rank {stopped} on " in log
    assert log.count("the run goes on after it stood still for ") == 1
    assert "error: " not in log
    assert not (tmp_path / "hang.json").exists()
    assert os.listdir(tmp_path / "stacks") == []


def test_a_whole_run_that_is_suspended_goes_on(tmp_path: Path) -> None:
    """For longer than the limit, as by a scheduler or a lid that is closed: nobody stood still."""
    with _ranks(tmp_path, "steps = 100") as processes:
        _stop_in_a_step(tmp_path, 0, processes[0])
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(CONFIG.limit_s + 2.0)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        assert [process.wait(30) for process in processes] == [0, 0]
    assert "error: " not in _log(tmp_path, 0) + _log(tmp_path, 1)


@pytest.mark.parametrize("held", [0, 1])
def test_a_rank_that_waits_for_its_data_is_named_by_its_phase(held: int, tmp_path: Path) -> None:
    """Both threads live, both ranks stand still: the phases tell who waits for whom. Each dumps its stacks."""
    extra = f"""
def held(step):
    if rank == {held} and step == 5: time.sleep(600)
"""
    with _ranks(tmp_path, extra) as processes:
        assert [process.wait(OVER_S + 10.0) for process in processes] == [7, 7]
    told = json.loads((tmp_path / "hang.json").read_text())
    assert (told["kind"], told["by"]) == ("behind", 0)
    assert [(each["rank"], each["phase"], each["step"]) for each in told["ranks"]] == [(held, "data", 5)]
    assert "in held" in _stacks(tmp_path, held)
    assert "in meet" in _stacks(tmp_path, 1 - held)
    assert f"error: {told['message']}" in _log(tmp_path, 0)


def test_a_blocked_interpreter_dumps_its_stacks_by_the_alarm(tmp_path: Path) -> None:
    """An extension that waits with the interpreter's lock held stops the rank's own watchdog too."""
    extra = """
import ctypes
def held(step):
    if rank == 1 and step == 30: ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
"""
    with _ranks(tmp_path, extra) as processes:
        assert processes[0].wait(OVER_S + 10.0) == 7
        _wait_until(lambda: "in held" in _stacks(tmp_path, 1), 10.0)
    assert re.search(
        r"error: rank 1 on .* in phase '\w+' of step \d+ by its last heartbeat: its process runs, but its interpreter",
        _log(tmp_path, 0),
    )


def test_a_rank_that_was_killed_is_said_to_be_gone(tmp_path: Path) -> None:
    """Where its collectives do not notice, nothing else would."""
    with _ranks(tmp_path) as processes:
        _wait_for_a_step(tmp_path, 1)
        processes[1].kill()
        processes[1].wait()
        assert processes[0].wait(OVER_S) == 7
    assert ": its process is gone: killed, or out of memory; the other ranks wait" in _log(tmp_path, 0)


def test_a_folder_that_does_not_answer_does_not_save_a_hang(tmp_path: Path) -> None:
    """The heart waits for a file for ever (a pipe that nobody reads): the guard ends the process without files."""
    extra = """
from regen_dist.observe import hang_detector
hang_detector.stale_s = lambda config: 0.2
def silent(*_): time.sleep(600)
def held(step):
    if step == 5:
        hang_detector.write_beat = silent
        time.sleep(600)
"""
    with _ranks(tmp_path, extra) as processes:
        assert [process.wait(OVER_S + 10.0) for process in processes] == [7, 7]
    assert "in phase 'data' of step 5, and cannot report it: does the file system of" in _log(tmp_path, 0)
    assert not (tmp_path / "hang.json").exists()


@pytest.mark.parametrize("stopped", [0, 1])
def test_the_launcher_gives_the_exit_code_and_kills_the_stopped_rank(
    stopped: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The job's exit code is 7, soon after the limit: a stopped rank is not waited for as long as one that saves."""
    extra = f"""
import signal
def held(step):
    if rank == {stopped} and step == 30:
        (run / "process").write_text(str(os.getpid()))
        (run / "stopped").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGSTOP)
"""
    code = launch(_program(extra), ranks=2, logs=tmp_path / "logs", environment=_environment(tmp_path), grace_s=60.0)
    took_s = time.time() - float((tmp_path / "stopped").read_text())
    assert code == 7
    assert took_s < OVER_S + 2.0
    assert not runs(int((tmp_path / "process").read_text()))
    said = capfd.readouterr().err
    assert f"launcher: rank {stopped} is stopped; killing it" in said
    assert f"error: rank {stopped} on " in said, "of rank 1 the end of its log is shown"


def test_a_hang_at_the_end_of_a_run_is_found_too(tmp_path: Path) -> None:
    """One rank is done, the other never comes to its end."""
    extra = """
steps = 5
def final():
    if rank == 1: time.sleep(600)
"""
    with _ranks(tmp_path, extra) as processes:
        assert [process.wait(OVER_S + 10.0) for process in processes] == [0, 7]
    told = json.loads((tmp_path / "hang.json").read_text())
    assert [(each["rank"], each["phase"], each["step"]) for each in told["ranks"]] == [(1, "save", 5)]
    assert "in final" in _stacks(tmp_path, 1)


def test_a_training_run_ends_when_a_rank_is_stopped(config: Path) -> None:
    """The real loop: rank 1 is stopped in the middle, rank 0 waits in a collective."""
    run, log = config.parent / "runs" / "hang", config.with_name("hang.log")
    limits = [f"guards.hang.{name}" for name in ("beat_s=0.2", "warn_s=3", "limit_s=6", "start_limit_s=120")]
    process = start_regen("train", config, "--ranks", 2, "name=hang", "train.steps=100000", *limits, log=log)
    try:
        wait_for_step(run, 3, process)
        _wait_for_a_step(run, 1)  # rank 0's record may be ahead of rank 1's heartbeat
        (stopped,) = [beat.pid for beat in [parse_beat(read_text(beat_path(run, 1)))] if beat]
        since = time.monotonic()
        os.kill(stopped, signal.SIGSTOP)
        assert process.wait(OVER_S + 4.0) == 7
        took_s = time.monotonic() - since
    finally:
        process.kill()
    assert took_s > CONFIG.limit_s - 2 * CONFIG.beat_s, "the last heartbeat was a little before"
    assert not runs(stopped)
    told = json.loads((run / "hang.json").read_text())
    assert [(each["rank"], each["pid"]) for each in told["ranks"]] == [(1, stopped)]
    assert told["ranks"][0]["step"] >= 3
    text = log.read_text()
    assert "warning: rank 1 on " in text
    assert f"error: {told['message']}" in text
    assert "Traceback" not in text
    assert "loop.py" in _stacks(run, 0)
