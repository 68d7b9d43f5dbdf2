"""A dataset of small samples whose bytes are drawn, for what reads bytes and decodes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from regen_dist.data.dataset.claim import claim
from regen_dist.data.dataset.index import SCHEMA_VERSION, Described
from regen_dist.data.dataset.manifest import MANIFEST, write_manifest
from regen_dist.data.dataset.writing import Limits, NewSample, ShardWriter, index_name
from regen_dist.data.objects.store import Store

_DESCRIBED = Described(frames=17, height=64, width=64, fps=24.0, source="drawn bytes, not a video")


def make_small_samples(
    url: str, number: int, *, smallest: int = 20_000, largest: int = 200_000, shard_mb: int = 64, seed: int = 0
) -> None:
    """Write `number` samples of `smallest` to `largest` bytes (evenly drawn in the logarithm) as a dataset at `url`;
    nothing happens when it is there. DataError when something else is."""
    store = Store(url)
    options: dict[str, Any] = {"number": number, "bytes": [smallest, largest], "shard_mb": shard_mb, "seed": seed}
    claim(store, {"kind": "synthetic", "schema_version": SCHEMA_VERSION, "options": options})
    if store.size(MANIFEST) is not None:
        return
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.uniform(np.log(smallest), np.log(largest), number)).astype(int).tolist()
    with ShardWriter(store, "small", Limits(shard_mb << 20)) as writer:
        for each, size in enumerate(sizes):
            writer.add(NewSample(f"small-{each:06d}", generator.bytes(size), _DESCRIBED))
    write_manifest(store, [index_name("small", shard) for shard in range(writer.shards)], "synthetic", options)
