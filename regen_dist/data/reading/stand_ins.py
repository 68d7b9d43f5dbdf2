"""Stand-ins for the samples that cannot be decoded or read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from regen_dist.data.order.order import MicroBatch
from regen_dist.data.reading.fetching import Bytes, Fetcher, Place
from regen_dist.data.reading.sample_set import SampleSet
from regen_dist.errors import DataError

STAND_INS = 8  # tried before a sample's neighbours count as bad too


class BadSample(NamedTuple):
    """A sample that another one stood in for, and why."""

    shard: str
    key: str
    reason: str


class Taken(NamedTuple):
    """What came of a micro-batch: the sample that each of its slots comes from; the samples that were bad, stand-ins
    among them; how many slots have stand-ins."""

    places: list[Place]
    bad: tuple[BadSample, ...]
    stand_ins: int


def take_all(
    data: SampleSet[Any],
    fetcher: Fetcher,
    batch: MicroBatch,
    found: Sequence[Bytes],
    take: Callable[[int, Place, bytes], None],
) -> Taken:
    """Let `take` have the bytes of every sample of a micro-batch, or those of one that stands in for it.

    A bad sample's stand-in follows from the seed and the sample's place in the order alone, so every number of ranks
    and workers takes the same one.

    Args:
        data: samples and order.
        fetcher: where a stand-in's bytes come from.
        batch: the micro-batch.
        found: what came of its samples.
        take: told the slot, the sample and its bytes; raises DataError when the sample is bad.

    Raises:
        DataError: a sample is bad, and so is everything that could stand in for it.
    """
    places, bad, stand_ins = [], list[BadSample](), 0
    for slot, first in enumerate(data.places(batch)):
        place, each = first, found[slot]
        for attempt in range(1, STAND_INS + 2):
            try:
                if each.problem is not None:
                    raise DataError(each.problem)
                take(slot, place, each.data)
                places.append(place)
                stand_ins += attempt > 1
                break
            except DataError as error:
                bad.append(_bad(data, place, str(error)))
            place = data.stand_in(batch, slot, attempt)
            each = fetcher.one(place)
        else:
            raise DataError(
                f"{STAND_INS} samples were tried in place of {bad[-1 - STAND_INS].key}, and each was bad; the "
                f"last: {bad[-1].reason}. Run `regen shards verify` on the dataset"
            )
    return Taken(places, tuple(bad), stand_ins)


def _bad(data: SampleSet[Any], place: Place, reason: str) -> BadSample:
    try:
        key = data.datasets[place.dataset].sample(place.row.row).key
    except DataError:
        key = f"row {place.row.row}"
    return BadSample(place.row.shard, key, reason)
