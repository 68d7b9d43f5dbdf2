"""Items made ahead: in order, so many ahead, errors in their turn, and no thread left."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest

from regen_dist.data.loading import latent_loader
from regen_dist.data.loading.latent_loader import in_background


class Source:
    """Numbers, without end or up to a mistake; `made` of them so far, and `more` counts those that no test awaited."""

    def __init__(self, mistake: int | None = None, end: int = 1000) -> None:
        self.made, self.closed, self.more = 0, threading.Event(), threading.Semaphore(0)
        self._mistake, self._end = mistake, end

    def items(self) -> Generator[int]:
        try:
            for number in range(self._end):
                if number == self._mistake:
                    raise ValueError("a mistake")
                self.made += 1
                self.more.release()
                yield number
        finally:
            self.closed.set()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_items_come_in_order_and_to_an_end() -> None:
    assert list(in_background(Source(end=20).items(), 3)) == list(range(20))
    assert threads() == []


def test_so_many_are_made_ahead_and_no_more() -> None:
    source = Source()
    items = in_background(source.items(), 3)
    assert next(items) == 0
    for _ in range(4):  # the one that was taken, and three that wait
        assert source.more.acquire(timeout=60)
    assert not source.more.acquire(timeout=0.2), "a fourth is made while three wait"
    items.close()


def test_nothing_is_made_before_the_first_is_asked_for() -> None:
    source = Source()
    in_background(source.items(), 3).close()
    assert (source.made, threads()) == (0, [])


def test_an_error_comes_in_its_turn() -> None:
    source = Source(mistake=2)
    items = in_background(source.items(), 8)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="a mistake"):
        next(items)
    assert source.closed.is_set()
    assert threads() == []


@pytest.mark.parametrize("taken", [1, 5])
def test_closing_ends_the_thread_and_what_it_reads(taken: int) -> None:
    source = Source()
    items = in_background(source.items(), 2)
    for _ in range(taken):
        next(items)
    assert len(threads()) == 1
    items.close()
    assert source.closed.is_set()
    assert threads() == []


def test_closing_does_not_wait_for_a_read_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_loader, "_ENDING_S", 0.01)
    goes_on, closed = threading.Event(), threading.Event()

    def slow() -> Generator[int]:
        try:
            yield 0
            goes_on.wait(30)
            yield 1
        finally:
            closed.set()

    items = in_background(slow(), 2)
    next(items)
    items.close()
    assert not closed.is_set()
    goes_on.set()
    assert closed.wait(60), "the thread ends as soon as it can"
    for thread in threads():
        thread.join(60)
