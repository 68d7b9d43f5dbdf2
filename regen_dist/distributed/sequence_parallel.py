"""Sequence parallelism (Jacobs et al., 2023, DeepSpeed Ulysses): consecutive ranks that share samples, the rows of
tokens that their models make of them, and the samples themselves, which one of them reads for all.

The gradients of weights need no exchange of their own: ZeRO-3 takes their mean over all ranks, of a group too (see
`models.sequence_parallel.SequenceShard.whole`).

Legend: as in `models/sequence_parallel.py`.
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
import torch.nn.functional as F
from torch import Tensor

from regen_dist.distributed.ranks import TIMEOUT, Ranks
from regen_dist.distributed.rendezvous import has_failed
from regen_dist.errors import RegenError, TrainingError
from regen_dist.models.sequence_parallel import WHOLE, Rows, SequenceShard, row_lengths

Item = TypeVar("Item")
Source = Callable[[], Generator[Item]]


class RowGroup(Rows):
    """The ranks that share samples with this one.

    Args:
        ranks: this process's place.
        size: ranks of the group, S.
        group: their process group; None where there is only one.
        feed: gloo group of the same ranks, for their samples.
    """

    def __init__(self, ranks: Ranks, size: int = 1, group: Any = None, feed: Any = None) -> None:
        self.ranks, self.size, self.group = ranks, size, group
        self.index = ranks.rank % size
        self._reader = SharedReader(feed, ranks.rank - self.index, reads=self.leads)

    @property
    def leads(self) -> bool:
        """Return whether this rank reads and counts the samples of its group, which must happen once."""
        return self.index == 0

    @property
    def readers(self) -> Ranks:
        """Return the place of the group among the groups, each of which reads samples of its own."""
        if self.size == 1:
            return self.ranks
        return Ranks(self.ranks.rank // self.size, self.ranks.world_size // self.size, self.ranks.local_rank)

    def share(self, length: int) -> SequenceShard:
        return WHOLE if self.size == 1 else _RowShard(self, length)

    def read(self, source: Source[Item]) -> Generator[Item]:
        """Yield on every rank of the group the items that `source` yields on the first. A failed read or a replacement
        sample on one rank alone cannot make the ranks differ, and each sample is read once. Items arrive ahead of time,
        over a gloo group of their own (see `SharedReader`).

        Raises:
            RegenError: the error of the first rank, on every rank.
        """
        return source() if self.size == 1 else self._reader.read(source)


def join_rows(ranks: Ranks, size: int) -> RowGroup:
    """Groups of `size` consecutive ranks. A collective of all ranks, whose number is a multiple of it."""
    if size == 1:
        return RowGroup(ranks)
    group, _ = dist.new_subgroups(size, timeout=TIMEOUT)
    feed, _ = dist.new_subgroups(size, timeout=TIMEOUT, backend="gloo")
    return RowGroup(ranks, size, group, feed)


class _RowShard(SequenceShard):
    """A part of a row of `length` tokens; the others are on the other ranks."""

    def __init__(self, rows: RowGroup, length: int) -> None:
        self.rows, self.lengths = rows, row_lengths(length, rows.size)
        start = sum(self.lengths[: rows.index])
        self.own = slice(start, start + self.lengths[rows.index])

    def own_heads(self, heads: int) -> slice:
        each = heads // self.rows.size
        return slice(self.rows.index * each, (self.rows.index + 1) * each)

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        size, count = self.rows.size, len(tensors)
        batch, heads, _, width = tensors[0].shape
        by_rank = torch.stack([each.unflatten(1, (size, -1)).movedim(1, 0) for each in tensors], 1)
        shapes = [(count, batch, heads // size, length, width) for length in self.lengths]
        sizes = [count * batch * heads // size * length * width for length in self.lengths]
        parts = self._exchange(by_rank.flatten(), [by_rank[0].numel()] * size, sizes)
        row = torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], -2)
        return row.unbind(0)  # [B, N/S, L, E] each

    def to_tokens(self, mixed: Tensor) -> Tensor:
        size, own = self.rows.size, self.lengths[self.rows.index]
        batch, heads, _, width = mixed.shape
        by_rank = [part.flatten() for part in mixed.split(self.lengths, 2)]
        sizes = [batch * heads * own * width] * size
        parts = self._exchange(torch.cat(by_rank), [part.numel() for part in by_rank], sizes)
        return torch.cat([part.view(batch, heads, own, width) for part in parts], 1)

    def whole(self, tokens: Tensor) -> Tensor:
        return _Gather.apply(tokens, self)  # type: ignore[no-untyped-call, no-any-return]

    def _exchange(self, flat: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, ...]:
        """Pieces of `flat` of the sizes `sent`, one to each rank; returns those from each, of the sizes `received`."""
        mixed: Tensor = _Exchange.apply(flat, sent, received, self.rows.group)  # type: ignore[no-untyped-call]
        return tuple(torch.split(mixed, received))


class _Exchange(torch.autograd.Function):
    """Exchange tokens all-to-all; the backward pass sends every gradient back to where the number came from."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(flat, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad.contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = flat.new_empty(sum(received))
    dist.all_to_all_single(out, flat, received, sent, group=group)
    return out


class _Gather(torch.autograd.Function):
    """Gather the whole row from its parts; the backward pass returns S times the gradient of own tokens (see
    `SequenceShard.whole`)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, part: _RowShard) -> Tensor:
        ctx.own, ctx.size = part.own, part.rows.size
        missing = part.lengths[0] - tokens.shape[1]  # the first part is the longest, and collectives want equal ones
        padded = F.pad(tokens, (0, 0, 0, missing)).contiguous()
        parts = [torch.empty_like(padded) for _ in part.lengths]
        dist.all_gather(parts, padded, group=part.rows.group)
        return torch.cat([each[:, :length] for each, length in zip(parts, part.lengths, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.size * grad[:, ctx.own], None


# Reading for ranks that share samples: one of them reads and broadcasts, ahead of time, in a thread.
#
# The broadcasts go over a gloo group of their own, so that they wait for no kernel of a training step and no kernel
# waits for them: the next items arrive while a step computes. An item's tensors are sent as they are, from CPU memory
# to CPU memory (pinned where there is a GPU); only what is around them is pickled.
#
# Every rank of the group makes the same sequence of broadcasts: item by item, then one message that ends them. A rank
# that takes no more items still receives up to that message, so that the group can be used again.

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
