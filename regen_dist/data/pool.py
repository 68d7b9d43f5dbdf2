"""Pool of worker processes, with results in order and bounded memory."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from regen_dist.errors import DataError
from regen_dist.programs import start_safely

Tag = TypeVar("Tag")
Result = TypeVar("Result")
Item = TypeVar("Item")
Progress = Callable[[str, int, int], None]  # called with (stage, done, total) by long operations


def share_of(items: Sequence[Item], task: tuple[int, int]) -> Sequence[Item]:
    """Return the items of task (i, n): every n-th from the i-th, which is counted from 0.

    Raises:
        DataError: there is no such task.
    """
    number, count = task
    if not 0 <= number < count:
        raise DataError(f"--task {number}/{count}: must be one of 0/{count} to {max(count, 1) - 1}/{max(count, 1)}")
    return items[number::count]


class Call(Generic[Result]):
    """Call submitted to a pool."""

    def __init__(self, wait_for: Callable[[], Result]) -> None:
        self._wait_for = functools.cache(wait_for)

    def result(self) -> Result:
        """Wait for the result. Raises what the function raised; DataError if a worker process died."""
        try:
            return self._wait_for()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (killed, out of memory, or a video that crashes the decoder). Run the same "
                "command again: finished shards stay; with --workers 0 the program stops at the video that does it"
            ) from error


class Pool:
    """Executor of functions in worker processes, or in this one when their results are requested."""

    def __init__(self, executor: ProcessPoolExecutor | None, ahead: int) -> None:
        self._executor, self._ahead = executor, ahead

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Call[Result]:
        if self._executor is None:
            return Call(lambda: function(*arguments))
        try:
            return Call(self._executor.submit(function, *arguments).result)
        except BrokenProcessPool as error:
            broken = error
            return Call(lambda: _raise(broken))

    def run(
        self, function: Callable[..., Result], calls: Iterable[tuple[Tag, tuple[Any, ...]]]
    ) -> Iterator[tuple[Tag, Result]]:
        """Yield the tag and `function(*arguments)` for each (tag, arguments) of `calls`, in order, with just enough
        calls in flight to keep all workers busy.

        Raises:
            DataError: a worker process died.
        """
        waiting: deque[tuple[Tag, Call[Result]]] = deque()
        for tag, arguments in calls:
            waiting.append((tag, self.submit(function, *arguments)))
            if len(waiting) > self._ahead:
                first, call = waiting.popleft()
                yield first, call.result()
        for tag, call in waiting:
            yield tag, call.result()


@contextmanager
def worker_pool(workers: int | None) -> Iterator[Pool]:
    """Open a pool of `workers` processes: all cores for None, this process for 0. Spawned, because obstore's threads do
    not survive a fork. An exception kills the workers at once."""
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    if count == 0:
        yield Pool(None, 0)
        return
    start_safely()
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        yield Pool(executor, 2 * count)
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()  # their results are only used here
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _raise(error: Exception) -> Any:
    raise error


def _start_worker() -> None:
    """Leave Ctrl-C, and the signals by which a batch system ends a job, to the parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this worker when its parent process ends, even by SIGKILL.

    Workers would not notice otherwise: a pool's waits on a queue that it holds open itself, and a loader's parent is
    the fork server, which lives as long as its workers.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None, "only worker processes run this"
    wait([parent.sentinel])
    os._exit(1)
