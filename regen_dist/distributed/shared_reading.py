"""Reading for ranks that share samples: one of them reads and broadcasts, ahead of time, in a thread.

The broadcasts go over a gloo group of their own, so that they wait for no kernel of a training step and no kernel waits
for them: the next items arrive while a step computes. An item's tensors are sent as they are, from CPU memory to CPU
memory (pinned where there is a GPU); only what is around them is pickled.

Every rank of the group makes the same sequence of broadcasts: item by item, then one message that ends them. A rank
that takes no more items still receives up to that message, so that the group can be used again.
"""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable, Generator
from enum import Enum
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from regen_dist.distributed.rendezvous import has_failed
from regen_dist.errors import RegenError, TrainingError

Item = TypeVar("Item")
Source = Callable[[], Generator[Item]]

AHEAD = 2  # items that are broadcast before they are due
_ENDING_S, _FAILED_S = 60.0, 1.0  # longest wait for the thread at the end, and in a process that has failed


class _End(Enum):
    """Reason why no item follows: the source has no more, or the reading rank wants no more."""

    EXHAUSTED = "exhausted"
    CLOSED = "closed"


class _Message(NamedTuple):
    """One broadcast: an item, or the error or the end in its place."""

    item: Any = None
    error: BaseException | None = None
    end: _End | None = None

    @property
    def is_last(self) -> bool:
        return self.error is not None or self.end is not None


class SharedReader:
    """Reader of a group of ranks.

    Args:
        group: gloo group of these ranks, which nothing else uses.
        reading_rank: global rank of the one that reads.
        reads: true on that rank.
    """

    def __init__(self, group: Any, reading_rank: int, *, reads: bool) -> None:
        self.group, self.reading_rank, self.reads = group, reading_rank, reads
        self._thread: threading.Thread | None = None

    def read(self, source: Source[Item]) -> Generator[Item]:
        """Yield on every rank of the group the items that `source` yields on the reading rank, in its order. All ranks
        take the same number of them, and then close this or take the end.

        Raises:
            RegenError: the error of the reading rank, instead of the item that it could not read.
        """
        reading = _Reading(self, source, self._thread)
        self._thread = threading.Thread(target=reading.run, name="shared reading", daemon=True)
        self._thread.start()
        try:
            yield from reading.taken()
        finally:
            reading.end()
            self._thread.join(_FAILED_S if has_failed() else _ENDING_S)

    def send(self, head: bytes, tensors: list[Tensor]) -> None:
        """Broadcast an encoded message."""
        self._broadcast(torch.tensor([len(head)]))
        self._broadcast(torch.frombuffer(bytearray(head), dtype=torch.uint8))
        for tensor in tensors:
            self._broadcast(_bytes_of(tensor.contiguous()))

    def receive(self) -> _Message:
        """Return the message that the reading rank broadcasts next."""
        self._broadcast(length := torch.zeros(1, dtype=torch.int64))
        self._broadcast(head := torch.empty(int(length), dtype=torch.uint8))
        pickled, forms = pickle.loads(head.numpy().tobytes())
        pinned = torch.cuda.is_available()
        tensors = [torch.empty(shape, dtype=dtype, pin_memory=pinned) for shape, dtype in forms]
        for tensor in tensors:
            self._broadcast(_bytes_of(tensor))
        message: _Message = _Unpickler(io.BytesIO(pickled), tensors).load()
        return message

    def _broadcast(self, data: Tensor) -> None:
        if data.numel():
            dist.broadcast(data, src=self.reading_rank, group=self.group)


class _Reading(Generic[Item]):
    """One pass over a source: a thread that broadcasts its items ahead, and the consumer that takes them."""

    def __init__(self, reader: SharedReader, source: Source[Item], before: threading.Thread | None) -> None:
        self._reader, self._source, self._before = reader, source, before
        self._room, self._closed = threading.Semaphore(AHEAD), threading.Event()
        self._ready: SimpleQueue[_Message] = SimpleQueue()
        self._items: Generator[Item] | None = None

    def run(self) -> None:
        """Broadcast, in the thread, while there is room; after the broadcasts of the pass before."""
        try:
            if self._before is not None:
                self._before.join()
            if self._reader.reads:
                self._send()
            else:
                self._receive()
        except BaseException as error:  # noqa: BLE001 - raised where an item is awaited, which would otherwise wait forever
            self._ready.put(_Message(error=error))
        finally:
            if self._items is not None:
                self._items.close()

    def taken(self) -> Generator[Item]:
        """Yield the items in the consumer, waiting for each."""
        while (message := self._ready.get()).end is not _End.EXHAUSTED:
            if message.error is not None:
                raise message.error
            if message.end is _End.CLOSED:
                raise TrainingError(
                    f"rank {self._reader.reading_rank}, which reads for this one, stopped; its own output says why"
                )
            self._room.release()
            yield message.item

    def end(self) -> None:
        """Let the thread end, also while it waits for room."""
        self._closed.set()
        self._room.release()

    def _send(self) -> None:
        message = _Message()
        while not message.is_last:
            self._room.acquire()
            message = _Message(end=_End.CLOSED) if self._closed.is_set() else self._next()
            encoded, message = _encoded_safely(message)
            self._reader.send(*encoded)
            self._ready.put(message)

    def _next(self) -> _Message:
        try:
            if self._items is None:
                self._items = self._source()
            return _Message(next(self._items))
        except StopIteration:
            return _Message(end=_End.EXHAUSTED)
        except BaseException as error:  # noqa: BLE001 - raised by every rank of the group
            return _Message(error=error)

    def _receive(self) -> None:
        message = _Message()
        while not message.is_last:
            if not self._closed.is_set():
                self._room.acquire()
            message = self._reader.receive()
            self._ready.put(message)


# Messages as bytes and tensors.


class _Pickler(pickle.Pickler):
    """Pickler that leaves tensors out, and lists them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, each: Any) -> int | None:
        if type(each) is not Tensor:
            return None
        self.tensors.append(each.detach().cpu())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Unpickler that puts the tensors in their places."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, index: int) -> Tensor:
        return self._tensors[index]


def _encoded_safely(own: _Message) -> tuple[tuple[bytes, list[Tensor]], _Message]:
    """Encode this rank's message for the others. An error that is not a RegenError reaches them as one, and an item
    that cannot be pickled is an error on every rank."""
    try:
        return _encoded(own._replace(error=_as_regen_error(own.error))), own
    except Exception as error:  # noqa: BLE001 - raised by every rank of the group
        return _encoded(_Message(error=_as_regen_error(error))), _Message(error=error)


def _as_regen_error(error: BaseException | None) -> RegenError | None:
    if error is None or isinstance(error, RegenError):
        return error
    return RegenError(f"{type(error).__name__}: {error}")


def _encoded(message: _Message) -> tuple[bytes, list[Tensor]]:
    pickler = _Pickler(file := io.BytesIO())
    pickler.dump(message)
    forms = [(tuple(tensor.shape), tensor.dtype) for tensor in pickler.tensors]
    return pickle.dumps((file.getvalue(), forms)), pickler.tensors


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's memory as uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8)
