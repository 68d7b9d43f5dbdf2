"""SIGKILL at random moments, twenty times in a row: the run always comes back."""

from __future__ import annotations

import os
import random
import secrets
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.observe.record import read_record
from tests.helpers.checkpoints import folder_of, newest
from tests.helpers.comeback import assert_equal, ending, first_lines, small_run, train
from tests.helpers.ranks import Started, run_ranks, start_ranks
from tests.helpers.tiny import tiny_dataset

KILLS, STEPS = 20, 40
MOST_STEPS = 3  # of a start before it is killed, but for what the delay lets pass
AT_STEP = 0.75  # share of the kills that come after some steps, and so often in a save; the others come while it starts
NEAR_END = STEPS - 3 * MOST_STEPS  # from here on they all come while it starts: it must not end by itself


class Pace(NamedTuple):
    """Seconds that this machine needs for a start, and for one step with its save."""

    start_s: float
    step_s: float


@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_twenty_times_comes_back(tmp_path: Path) -> None:
    """One rank or both, while it starts, trains or saves: it goes on from the newest committed checkpoint, which is
    never more than two steps old, and never from scratch once there is one; it ends with the undisturbed run's losses,
    weights, moments and averages, bit for bit."""
    seed = int(os.environ.get("REGEN_KILL_SEED") or secrets.randbits(32))
    print(f"to repeat: REGEN_KILL_SEED={seed}")
    chance = random.Random(seed)
    data = tiny_dataset(tmp_path / "data")
    whole, config = (small_run(tmp_path, data, name, train__steps=STEPS) for name in ("undisturbed", "killed"))
    pace = _pace(whole)
    for number in range(KILLS):
        before = _step(config)
        logs = tmp_path / "logs" / str(number)
        with start_ranks(train, 2, config, logs=logs) as started:
            _kill(started, config, chance, pace, before)
        _check(config, before, logs)
        print(f"kill {number}: from step {before} to {_step(config)}, left behind: {folder_of(config.folder).debris()}")
    before = _step(config)
    assert before > 0, "some kill came after a checkpoint"
    with start_ranks(train, 2, config, logs=tmp_path / "last") as started:
        assert started.results() == [0, 0]
    _check(config, before, tmp_path / "last")
    assert not folder_of(config.folder).debris()
    assert_equal(ending(config), ending(whole))


def _pace(config: EmbedderConfig) -> Pace:
    """Train undisturbed, and time it."""
    run_ranks(time.time, 2)  # what ranks are forked from is there afterwards
    began = time.time()
    assert run_ranks(train, 2, config) == [0, 0]
    times = [line["time"] for line in read_record(config.folder / "metrics.jsonl", "train")]
    return Pace(times[0] - began, (times[-1] - times[0]) / (STEPS - 1))


def _step(config: EmbedderConfig) -> int:
    """The newest checkpoint, which must be whole; 0 when nothing was ever committed."""
    return newest(config.folder).step if folder_of(config.folder).steps() else 0


def _reached(config: EmbedderConfig) -> int:
    """The last step that is in the record."""
    record = config.folder / "metrics.jsonl"
    return max((line["step"] for line in read_record(record, "train")), default=0) if record.exists() else 0


def _kill(started: Started, config: EmbedderConfig, chance: random.Random, pace: Pace, before: int) -> None:
    """One rank or both, at a moment that is drawn; what is left a little later, as the launcher ends it."""
    at_step, steps, share = chance.random() < AT_STEP, chance.randint(1, MOST_STEPS), chance.random()
    victims, patience_s = chance.choice([[0], [1], [0, 1]]), chance.uniform(0.0, 1.0)
    if at_step and before < NEAR_END:
        assert _made(started, config, before + steps, timeout_s=200), f"it did not reach step {before + steps}"
        _made(started, config, before + steps + 2, timeout_s=share * 1.5 * pace.step_s)
    else:
        _made(started, config, before + 1, timeout_s=share * pace.start_s)
    started.kill(victims)
    time.sleep(patience_s)
    started.kill()


def _made(started: Started, config: EmbedderConfig, step: int, timeout_s: float) -> bool:
    """Wait until this start has made a step; False when time is up. What an earlier start recorded of the same steps
    is dropped when this one resumes."""
    began, deadline = started.began, time.monotonic() + timeout_s
    record = config.folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        assert started.running == [0, 1], "a rank ended by itself"
        lines = read_record(record, "train") if record.exists() else []
        if any(line["step"] >= step and line["time"] >= began for line in lines):
            return True
        time.sleep(0.005)
    return False


def _check(config: EmbedderConfig, before: int, logs: Path) -> None:
    """A start went on from where the run was; what it committed is whole, and not more than two steps behind."""
    for line in first_lines(logs):  # none where it was killed before it came so far
        wanted = f"resumed at step {before} on 2 rank(s)" if before else "starting at step 0 on 2 rank(s)"
        assert line.endswith(wanted), line
    now = _step(config)
    assert now >= before
    assert now >= _reached(config) - 2
