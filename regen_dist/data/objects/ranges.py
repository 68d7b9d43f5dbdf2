"""Which byte ranges of an object are fetched by one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from regen_dist.errors import ObjectCut

Range = tuple[int, int]  # offset, size in bytes


class Span(NamedTuple):
    """One request: bytes [start, stop), which hold the ranges number `members` of those that were asked for."""

    start: int
    stop: int
    members: tuple[int, ...]


def joined(ranges: Sequence[Range], join_bytes: int) -> list[Span]:
    """Spans that cover all ranges (empty ones aside), in order of offset; ranges with a gap of at most `join_bytes`
    between them share a span. Spans never touch."""
    spans: list[Span] = []
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number]):
        offset, size = ranges[number]
        if size == 0:
            continue
        if spans and offset <= spans[-1].stop + join_bytes:
            last = spans[-1]
            spans[-1] = Span(last.start, max(last.stop, offset + size), (*last.members, number))
        else:
            spans.append(Span(offset, offset + size, (number,)))
    return spans


def split(ranges: Sequence[Range], spans: Sequence[Span], fetched: Sequence[memoryview], where: str) -> list[bytes]:
    """The ranges' own bytes out of what was fetched for each span; ObjectCut where a span came back too short."""
    found = [b""] * len(ranges)
    for span, view in zip(spans, fetched, strict=True):
        for number in span.members:
            offset, size = ranges[number]
            found[number] = exact(bytes(view[offset - span.start :][:size]), offset, size, where)
    return found


def exact(data: bytes, offset: int, size: int, where: str) -> bytes:
    """`data` when it has `size` bytes; ObjectCut otherwise. `where` is the object's URL."""
    if len(data) == size:
        return data
    raise ObjectCut(
        f"{where}: asked for {size} bytes at {offset}, got {len(data)}; the object is cut: run `regen shards verify` "
        "and build the shard again"
    )
