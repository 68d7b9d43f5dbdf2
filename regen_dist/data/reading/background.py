"""Items made ahead in a thread, off the path of whoever takes them."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing
from queue import SimpleQueue
from typing import Generic, TypeVar

_ENDING_S = 1.0  # a thread that is at work when it is no longer wanted ends after that; nobody waits for it longer

Item = TypeVar("Item")


def in_background(items: Generator[Item], ahead: int) -> Generator[Item]:
    """The items of `items`, up to `ahead` of which a thread has ready. Closing this ends the thread, which closes
    `items`.

    Raises:
        whatever making an item raises, when that item's turn comes.
    """
    made = _Made(items, ahead)
    thread = threading.Thread(target=made.make, name="ahead", daemon=True)
    thread.start()
    try:
        yield from made.taken()
    finally:
        made.end()
        thread.join(_ENDING_S)


class _Made(Generic[Item]):
    """What the thread and the taker share."""

    def __init__(self, items: Generator[Item], ahead: int) -> None:
        self._items, self._room = items, threading.Semaphore(ahead)
        self._ready: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()
        self._ended = threading.Event()

    def make(self) -> None:
        """In the thread: go on as long as there is room."""
        try:
            with closing(self._items):
                while self._has_room():
                    self._ready.put((next(self._items),))
        except StopIteration:
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the item is awaited; else that waits for ever
            self._ready.put(error)

    def taken(self) -> Generator[Item]:
        """Out of it: wait for one item after the other."""
        while (made := self._ready.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            self._room.release()
            yield made[0]

    def end(self) -> None:
        """Let the thread stop, whatever it waits for here."""
        self._ended.set()
        self._room.release()

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._ended.is_set()
