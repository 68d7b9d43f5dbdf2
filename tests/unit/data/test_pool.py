"""Calls in worker processes: order, errors, and workers that end when they should."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regen_dist.data.pool import worker_pool
from regen_dist.errors import DataError


def wait_and_square(seconds: float, number: int) -> int:
    time.sleep(seconds)
    return number * number


def fail(_: int) -> None:
    raise DataError("what the worker said")


def leave_pid(path: Path, seconds: float) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(seconds)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_the_calls(workers: int) -> None:
    calls = ((number, (0.05 if number % 3 == 0 else 0.0, number)) for number in range(12))
    with worker_pool(workers) as pool:
        assert list(pool.run(wait_and_square, calls)) == [(number, number**2) for number in range(12)]
        late = pool.submit(wait_and_square, 0.0, 5)
        assert (late.result(), late.result()) == (25, 25)


def test_only_so_many_calls_are_under_way() -> None:
    taken: list[int] = []

    def calls() -> Iterator[tuple[int, tuple[float, int]]]:
        for number in range(100):
            taken.append(number)
            yield number, (0.0, number)

    with worker_pool(1) as pool:
        results = pool.run(wait_and_square, calls())
        next(results)
        assert len(taken) <= 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_call_is_the_caller_s(workers: int) -> None:
    with pytest.raises(DataError, match="what the worker said"), worker_pool(workers) as pool:
        list(pool.run(fail, [(0, (0,))]))


def test_a_dead_worker_is_told_and_not_waited_for() -> None:
    with pytest.raises(DataError, match="a worker process died"), worker_pool(1) as pool:
        list(pool.run(die, [(number, ()) for number in range(20)]))


def be_interrupted(pid: Path) -> None:
    """As by Ctrl-C, while a worker is at a call that takes an hour."""
    with worker_pool(1) as pool:
        pool.submit(leave_pid, pid, 3600.0)
        while not pid.exists() or not pid.read_text():
            time.sleep(0.02)
        raise KeyboardInterrupt


def test_an_error_ends_the_workers_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        be_interrupted(tmp_path / "pid")
    assert not multiprocessing.active_children()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
