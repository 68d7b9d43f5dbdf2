"""Verification of a cache against its config: entries are encoded again and compared."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.format.catalogue import Dataset, open_dataset
from regen_dist.data.format.index import Sample
from regen_dist.data.format.latents import CacheFacts, unpack_latents
from regen_dist.data.format.manifest import MANIFEST, changes
from regen_dist.data.loading.fetch import FetchResult
from regen_dist.data.pool import Progress
from regen_dist.data.storage.connection import limits_of
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from regen_dist.inference.preencode import as_stored, check_source, samples_in
from regen_dist.inference.preencode_clips import (
    Batches,
    Inputs,
    Pending,
    cut_video,
    decode_clips,
    fingerprint_of,
    open_inputs,
)
from regen_dist.models.encoder import Latents

RELATIVE = 2.0**-6  # two steps of bf16: the other clips of a batch, or another machine, change the last bits
ABSOLUTE = {"fp32": 2.0**-10, "bf16": 2.0**-5}  # near zero, by the encoder's working precision


class Verified(NamedTuple):
    """Result of a verification: number of compared entries, largest difference of a value, and problems by key."""

    entries: int
    largest: float
    mismatches: tuple[str, ...]


def verify_cache(
    config: PreencodeConfig,
    *,
    samples: int = 16,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Verified:
    """Encode some entries of a finished cache again, and compare them with the stored ones.

    Values agree when they differ by at most `RELATIVE` of the larger, or by `ABSOLUTE`.

    Args:
        config: the config that the cache was made with.
        samples: number of entries, drawn with `seed`; all when there are fewer.
        progress: called with ("verify", done, total) in entries.

    Raises:
        DataError: there is no finished cache, or it was made from other inputs, which the message names.
    """
    inputs, cache = open_inputs(config), _open_cache(config)
    facts = CacheFacts.of(cache.manifest, cache.store.url)
    _check_fingerprint(cache, facts, inputs)
    chosen = _draw(len(cache), samples, seed)
    mismatches, largest = [], 0.0
    for number, row in enumerate(chosen, 1):
        entry = cache.sample(row)
        try:
            largest = max(largest, _compare(config, inputs, cache, facts, entry))
        except DataError as error:
            mismatches.append(f"{entry.name}: {error}")
        progress("verify", number, len(chosen))
    return Verified(len(chosen), largest, tuple(mismatches))


def _open_cache(config: PreencodeConfig) -> Dataset:
    limits = limits_of(config.read)
    if Store(config.output, limits).size(MANIFEST) is None:
        raise DataError(f"{config.output}: there is no {MANIFEST}: it is not finished; run the same without --verify")
    return open_dataset(config.output, config.read.cache, limits)


def _check_fingerprint(cache: Dataset, facts: CacheFacts, inputs: Inputs) -> None:
    options = cache.manifest.options
    wanted = check_source(cache.store, options.get("source"), inputs)
    stored = {name: options.get(name) for name in ("source", "preprocessing", "code")}
    stored["encoder"] = {"fingerprint": facts.encoder["fingerprint"]}
    stored["text"] = facts.text and {name: facts.text[name] for name in ("fingerprint", "width", "max_tokens")}
    different = changes(stored, {name: inputs.identity[name] for name in stored} | {"source": wanted})
    if different or facts.fingerprint != fingerprint_of(inputs.identity):
        raise DataError(
            f"{cache.store.url}: the cache was made of something else than the config says now "
            f"({'; '.join(different) or 'fingerprint'}); give the config, embedder and videos that made it, or make "
            "another cache"
        )


def _draw(total: int, samples: int, seed: int) -> list[int]:
    generator = np.random.Generator(np.random.Philox(key=seed))
    return sorted(generator.choice(total, min(samples, total), replace=False).tolist())


def _compare(config: PreencodeConfig, inputs: Inputs, cache: Dataset, facts: CacheFacts, entry: Sample) -> float:
    """Largest difference of an entry's values; DataError when the entry differs from the new encoding."""
    stored = unpack_latents(cache.read(entry))
    facts.check(stored, entry.frames, entry.height, entry.width)
    source = _source_of(inputs.dataset, entry)
    latents = _encoded(config, inputs, source)
    near_zero = ABSOLUTE[inputs.encoder.config.precision]
    largest = [
        _difference("content", stored.content, latents.content, near_zero),
        _difference("motion", stored.motion, latents.motion, near_zero),
    ]
    if inputs.text is not None and stored.text is not None:
        text = inputs.text.encode([source.caption])[0] if source.caption else inputs.text.null()
        largest.append(_difference("text", stored.text, as_stored(text), near_zero))
    return max(largest)


def _source_of(dataset: Dataset, entry: Sample) -> Sample:
    """The video that an entry was made from: the same key, in the source shard with the same number."""
    number = int(entry.shard.split("-")[1])
    if number < len(dataset.manifest.shards):
        for sample in samples_in(dataset, number):
            if sample.key == entry.key:
                return sample
    raise DataError(
        f"there is no video of this key in shard {number} of {dataset.store.url}"
        "; encode the dataset again, into another folder"
    )


def _encoded(config: PreencodeConfig, inputs: Inputs, source: Sample) -> Latents:
    video = Pending(source, cut_video(source, config, inputs.encoder.num_frames))
    batches = Batches(inputs.encoder, config.batch_clips, [video])
    found = FetchResult(inputs.dataset.read(source))
    for number, clip in enumerate(decode_clips(found, source.frames, video.cut)):
        batches.add(video, number, clip)
    batches.finish()
    return video.latents()


def _difference(name: str, stored: Tensor, made: Tensor, near_zero: float) -> float:
    """Largest difference of a value; DataError when a difference exceeds the tolerance."""
    if stored.shape != made.shape:
        raise DataError(f"{name} is {list(stored.shape)} and is made as {list(made.shape)} now")
    a, b = stored.float(), made.float()
    differences = (a - b).abs()
    allowed = torch.maximum(a.abs(), b.abs()) * RELATIVE + near_zero
    bad = ~(differences <= allowed)  # negated, so that NaN counts as bad
    if bool(bad.any()):
        raise DataError(
            f"{int(bad.sum())} of {bad.numel()} values of {name} differ from what is made now, by up to "
            f"{float(differences[bad].max()):.4g}"
        )
    return float(differences.max()) if differences.numel() else 0.0
