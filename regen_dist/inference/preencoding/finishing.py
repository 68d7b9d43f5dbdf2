"""Which shards of a cache are made, and what they say together once all of them are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa

from regen_dist.data.dataset.catalogue import Dataset
from regen_dist.data.dataset.index import read_index
from regen_dist.data.dataset.latents import NULL_TEXT
from regen_dist.data.dataset.manifest import Manifest, read_all, write_manifest
from regen_dist.data.dataset.writing import index_name
from regen_dist.data.objects.store import Store
from regen_dist.errors import DataError
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.preencoding.identity import KIND, fingerprint_of
from regen_dist.inference.preencoding.shard import stem_of
from regen_dist.inference.preencoding.sums import Sums, read_sums, sums_name
from regen_dist.inference.statistics import LatentStatistics
from regen_dist.models.text import TextEncoder

STATISTICS = "statistics.json"
_PIXEL_BYTES = 3


def unfinished(store: Store, numbers: Sequence[int]) -> list[int]:
    """Those of the source shards whose output is not whole: index and sums are there, and the tar that the index tells
    of has its size."""
    found = store.list("latents-")
    begun = [number for number in numbers if {_index(number), sums_name(stem_of(number))} <= found.keys()]
    whole = set()
    for number, (_, data) in zip(begun, read_all(store, [_index(number) for number in begun]), strict=True):
        facts = read_index(data)[1]
        if not facts["size"] or found.get(facts["name"]) == facts["size"]:
            whole.add(number)
    return [number for number in numbers if number not in whole]


def write_cache_manifest(
    store: Store, dataset: Dataset, identity: Mapping[str, Any], encoder: FrozenEncoder, text: TextEncoder | None
) -> Manifest:
    """Gather what all shards say, and write the statistics and the manifest.

    Raises:
        DataError: no entry is left, or something is damaged.
    """
    numbers = range(len(dataset.manifest.shards))
    _check_counts(store, dataset)
    sums = _sums(store, numbers)
    measured_on = {"dataset fingerprint": dataset.fingerprint}
    statistics = LatentStatistics(sums.clips, sums.images, measured_on).to_text()
    options = {
        "fingerprint": fingerprint_of(dict(identity)),
        "encoder": encoder.facts(),
        "preprocessing": identity["preprocessing"],
        "text": None if text is None else text.facts(),
        "code": identity["code"],
        "source": identity["source"],
        "num_frames": encoder.num_frames,
        "channels": encoder.channels,
        "statistics": json.loads(statistics),
        "null_text": None if text is None else NULL_TEXT,
        "frames_left_out": sums.frames_left_out,
        **_of_entries(store, numbers, dataset),
    }
    if store.size(STATISTICS) is None or store.get(STATISTICS) != statistics.encode():
        store.put(STATISTICS, statistics.encode())
    return write_manifest(store, [_index(number) for number in numbers], KIND, options)


def _check_counts(store: Store, dataset: Dataset) -> None:
    """DataError unless each shard accounts for every sample of its source shard, as an entry or as left out."""
    shards = dataset.manifest.shards
    for number, (name, data) in enumerate(read_all(store, [_index(number) for number in range(len(shards))])):
        table, facts = read_index(data)
        told = table.num_rows + len(facts["skipped"])
        if told != shards[number].samples:
            raise DataError(
                f"{store.url}/{name}: accounts for {told} videos, {shards[number].name} holds "
                f"{shards[number].samples}; remove {name} and run the same again, which makes that shard anew"
            )


def _index(number: int) -> str:
    return index_name(stem_of(number), 0)


def _sums(store: Store, numbers: Sequence[int]) -> Sums:
    """In the order of the shards: sums of numbers depend on it."""
    names = [sums_name(stem_of(number)) for number in numbers]
    parts = zip(numbers, read_all(store, names), strict=True)
    return reduce(add, (read_sums(store, stem_of(number), data) for number, (_, data) in parts), Sums())


def _of_entries(store: Store, numbers: Sequence[int], dataset: Dataset) -> dict[str, Any]:
    """The median frame rate of the clips (of the images, where there are no clips), and sizes to compare with."""
    rates, still_rates, pixels = [np.empty(0)], [np.empty(0)], 0
    for _, data in read_all(store, [_index(number) for number in numbers]):
        table: pa.Table = read_index(data)[0]
        fps, frames = table["fps"].to_numpy(), table["frames"].to_numpy().astype(np.int64)
        rates.append(fps[frames > 1])
        still_rates.append(fps[frames == 1])
        pixels += int((frames * table["height"].to_numpy() * table["width"].to_numpy()).sum())
    found = np.concatenate(rates) if any(map(len, rates)) else np.concatenate(still_rates)
    if not len(found):
        raise DataError(f"{store.url}: no video could be encoded; the indices there say why each was left out")
    sizes = {"source_bytes": dataset.manifest.totals.bytes, "pixel_bytes": _PIXEL_BYTES * pixels}
    return {"fps": float(np.median(found)), "sizes": sizes}
