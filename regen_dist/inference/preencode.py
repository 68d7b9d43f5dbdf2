"""Pre-encoding: a dataset of videos to a cache of latents and text embeddings.

A cache is a dataset (data/dataset) of kind "latents": one shard for each shard of videos, one entry for each video. It
is resumable: what is finished stays, the rest is made, the manifest is last. Tasks, also on several machines, share the
shards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.dataset.latents import NULL_TEXT, pack_null_text
from regen_dist.data.dataset.manifest import MANIFEST, Manifest, read_manifest
from regen_dist.data.objects.store import Store, limits_of, remove_leftovers
from regen_dist.data.pool import Progress
from regen_dist.data.reading.fetching import Fetcher
from regen_dist.errors import DataError
from regen_dist.inference.preencoding.captions import as_stored
from regen_dist.inference.preencoding.claiming import claim_cache
from regen_dist.inference.preencoding.cutting import count_clips
from regen_dist.inference.preencoding.decoding import decoders
from regen_dist.inference.preencoding.finishing import unfinished, write_cache_manifest
from regen_dist.inference.preencoding.inputs import Inputs, open_inputs
from regen_dist.inference.preencoding.shard import Encoded, Tools, encode_shard

MAX_BAD_SHARE = 0.5
_IDLE_S = 3600.0  # other tasks may be at work on other machines: what they write is newer than that


class Preencoded(NamedTuple):
    """What a call did: the manifest, or None while shards are left to other tasks; how many shards, clips and images it
    made, in how many seconds; how many shards there are and how many are missing."""

    manifest: Manifest | None
    shards_made: int
    shards: int
    shards_missing: int
    encoded: Encoded = Encoded()
    seconds: float = 0.0

    @property
    def clips_per_s(self) -> float:
        """Clips and images of this call a second, reading and writing included."""
        return sum(self.encoded) / self.seconds if self.seconds else 0.0


def preencode(
    config: PreencodeConfig,
    *,
    task: tuple[int, int] = (0, 1),
    max_bad_share: float = MAX_BAD_SHARE,
    progress: Progress = lambda stage, done, total: None,
) -> Preencoded:
    """Make (or finish) the cache of a dataset.

    Args:
        config: what is encoded, by what, and where to; `output` is empty, or begun by the same config, weights and
            videos.
        task: (i, n): make the shards of every n-th source shard from the i-th (from 0). The call that finds all shards
            made writes the manifest.
        max_bad_share: stop when a larger share of the many videos of a shard cannot be encoded.
        progress: called with ("encode", done, total) in clips and images of this task.

    Raises:
        DataError: the videos cannot be read, or have no captions; `output` holds something else; there is no such task;
            no entry is left.
        CheckpointError: the embedder has no usable checkpoint.
        ConfigError: the embedder is none.
    """
    index, count = task
    if not 0 <= index < count:
        raise DataError(f"--task {index}/{count}: must be one of 0/{count} to {max(count, 1) - 1}/{max(count, 1)}")
    inputs, store = open_inputs(config), Store(config.output, limits_of(config.read))
    claim_cache(store, inputs)
    if store.folder is not None:
        remove_leftovers(store.folder, idle_s=_IDLE_S if count > 1 else 0)
    numbers = range(len(inputs.dataset.manifest.shards))
    todo = unfinished(store, numbers[index::count])
    began = time.perf_counter()
    with _tools(config, inputs, store, max_bad_share) as tools:
        encoded = _encode(tools, store, todo, progress)
    done = Preencoded(None, len(todo), len(numbers), 0, encoded, time.perf_counter() - began)
    return _finish(done, inputs, store)


@contextmanager
def _tools(config: PreencodeConfig, inputs: Inputs, store: Store, max_bad_share: float) -> Iterator[Tools]:
    """What encodes; the embedding of the empty caption is written first."""
    text = None
    if inputs.text is not None:
        text = inputs.text, as_stored(inputs.text.null())
        store.put_new(NULL_TEXT, pack_null_text(text[1]))
    with Fetcher([inputs.dataset], config.read) as fetcher, decoders() as threads:
        yield Tools(config, inputs.dataset, inputs.encoder, text, fetcher, threads, max_bad_share)


def _encode(tools: Tools, store: Store, todo: Sequence[int], progress: Progress) -> Encoded:
    """Make the shards of these source shards."""
    total, done, encoded = _units(tools, todo), 0, Encoded()

    def told(units: int) -> None:
        nonlocal done
        done += units
        progress("encode", done, total)

    for number in todo:
        made = encode_shard(tools, number, store, told)
        encoded = Encoded(encoded.clips + made.clips, encoded.images + made.images)
    return encoded


def _units(tools: Tools, todo: Sequence[int]) -> int:
    """Clips and images in these source shards, by the index."""
    frames = tools.dataset.records["frames"]
    starts = np.cumsum([0, *(entry.samples for entry in tools.dataset.manifest.shards)])
    parts = [frames[starts[number] : starts[number + 1]].astype(np.int64) for number in todo]
    counts = [np.maximum(1, count_clips(part, tools.config, tools.encoder.num_frames)) for part in parts]
    return sum(int(each.sum()) for each in counts)


def _finish(done: Preencoded, inputs: Inputs, store: Store) -> Preencoded:
    """Write the manifest when nothing is missing. Of tasks that end together each may do so: it is the same one."""
    missing = len(unfinished(store, range(done.shards)))
    if missing:
        return done._replace(shards_missing=missing)
    if not done.shards_made and store.size(MANIFEST) is not None:
        return done._replace(manifest=read_manifest(store))
    manifest = write_cache_manifest(store, inputs.dataset, inputs.identity, inputs.encoder, inputs.text)
    return done._replace(manifest=manifest)
