"""Calls spread over worker processes, with results in order and bounded memory."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

from regen_dist.errors import DataError

Tag = TypeVar("Tag")
Result = TypeVar("Result")


class Pool:
    """Runs a function over many arguments, in worker processes or in this one, at most `ahead` calls before the
    consumer."""

    def __init__(self, executor: ProcessPoolExecutor | None, ahead: int) -> None:
        self._executor, self._ahead = executor, ahead

    def run(
        self, function: Callable[..., Result], calls: Iterable[tuple[Tag, tuple[Any, ...]]]
    ) -> Iterator[tuple[Tag, Result]]:
        """For each (tag, arguments): the tag and `function(*arguments)`, in the order of `calls`.

        Raises:
            DataError: a worker process died.
        """
        if self._executor is None:
            for tag, arguments in calls:
                yield tag, function(*arguments)
            return
        waiting: deque[tuple[Tag, Future[Result]]] = deque()
        try:
            for tag, arguments in calls:
                waiting.append((tag, self._executor.submit(function, *arguments)))
                if len(waiting) > self._ahead:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (killed, out of memory, or a video that crashes the decoder). Run the same "
                "command "
                "again: finished shards stay; with --workers 0 the program stops at the video that does it"
            ) from error


@contextmanager
def worker_pool(workers: int | None) -> Iterator[Pool]:
    """A pool of `workers` processes: all cores for None, this process for 0. Spawned, because obstore's threads do
    not survive a fork."""
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    if count == 0:
        yield Pool(None, 0)
        return
    executor = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        yield Pool(executor, 2 * count)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _first(waiting: deque[tuple[Tag, Future[Result]]]) -> tuple[Tag, Result]:
    tag, future = waiting.popleft()
    return tag, future.result()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """In a worker: end when the process that started it does, even by SIGKILL.

    Neither kind of worker would notice by itself: a pool's waits on a queue that it holds open too, and a loader's sees
    only the fork server, which lives as long as its workers.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None, "only worker processes run this"
    wait([parent.sentinel])
    os._exit(1)
