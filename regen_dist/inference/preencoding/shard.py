"""One shard of a cache, made of one shard of videos: the same keys in the same order, always from its beginning."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.dataset.catalogue import Dataset
from regen_dist.data.dataset.index import Described, Sample, samples_of
from regen_dist.data.dataset.latents import LATENT_EXTENSION, pack_latents
from regen_dist.data.dataset.manifest import Skip, listed
from regen_dist.data.dataset.writing import Limits, NewSample, ShardWriter
from regen_dist.data.objects.store import Store
from regen_dist.data.reading.fetching import Fetcher, Place
from regen_dist.errors import DataError
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.preencoding.batching import Batches, Pending
from regen_dist.inference.preencoding.captions import Captions
from regen_dist.inference.preencoding.cutting import NO_CUT, cut_video
from regen_dist.inference.preencoding.decoding import Decoders, Job
from regen_dist.inference.preencoding.sums import Sums, sums_name
from regen_dist.models.text import TextEncoder

_ENOUGH_TO_JUDGE = 20  # videos of one shard that cannot be encoded, before their share says something
_ONE_SHARD = Limits(size_bytes=sys.maxsize)


class Tools(NamedTuple):
    """What encoding any shard takes. `text` is the encoder and the embedding of the empty caption, or None."""

    config: PreencodeConfig
    dataset: Dataset
    encoder: FrozenEncoder
    text: tuple[TextEncoder, Tensor] | None
    fetcher: Fetcher
    decoders: Decoders
    max_bad_share: float


class Encoded(NamedTuple):
    """How many clips and images were encoded."""

    clips: int = 0
    images: int = 0


def stem_of(number: int) -> str:
    """How the names of the output of a source shard begin."""
    return f"latents-{number:06d}"


def samples_in(dataset: Dataset, number: int) -> list[Sample]:
    """The index entries of a dataset's shard."""
    return samples_of(dataset.index(number))


def encode_shard(tools: Tools, number: int, store: Store, told: Callable[[int], None]) -> Encoded:
    """Make the shard of source shard `number`: its tar, its sums, and last its index.

    Args:
        store: where to.
        told: of clips and images that are done, or will never be.

    Raises:
        DataError: more videos than `max_bad_share` cannot be encoded; the store does not answer.
        CheckpointError: a latent is not finite.
    """
    samples = samples_in(tools.dataset, number)
    captions = None if tools.text is None else Captions(tools.text[0], (s.caption for s in samples), tools.text[1])
    sums, encoded, bad = Sums(), Encoded(), list[Skip]()
    with ShardWriter(store, stem_of(number), _ONE_SHARD) as writer:
        for video in _encoded(tools, number, [_pending(sample, tools) for sample in samples]):
            told(video.cut.parts)
            if video.problem is not None:
                bad.append(Skip(source=video.sample.key, reason=video.problem))
                writer.skip(bad[-1])
                continue
            sums += _add(writer, video, captions)
            encoded = Encoded(encoded.clips + video.cut.clips, encoded.images + video.cut.is_image)
        _guard(tools, number, len(samples), bad)
        store.put(sums_name(stem_of(number)), sums.to_bytes())
    return encoded


def _pending(sample: Sample, tools: Tools) -> Pending:
    try:
        return Pending(sample, cut_video(sample, tools.config, tools.encoder.num_frames))
    except DataError as error:
        return Pending(sample, NO_CUT, problem=str(error))


def _encoded(tools: Tools, number: int, videos: Sequence[Pending]) -> Iterator[Pending]:
    """The videos in order, each with its latents or a problem."""
    batches = Batches(tools.encoder, tools.config.batch_clips, videos)
    for video, clips in tools.decoders.run(_jobs(tools, number, videos)):
        try:
            for place, clip in enumerate(clips):
                batches.add(video, place, clip)
        except DataError as error:
            video.problem = str(error)
        yield from batches.complete()
    batches.finish()
    yield from batches.complete()


def _jobs(tools: Tools, number: int, videos: Sequence[Pending]) -> Iterator[Job[Pending]]:
    """What is to be decoded, as its bytes arrive."""
    first = int(np.sum([shard.samples for shard in tools.dataset.manifest.shards[:number]], dtype=np.int64))
    wanted = (
        (video, [Place(0, tools.dataset.row(first + place))])
        for place, video in enumerate(videos)
        if video.problem is None
    )
    for video, (found,) in tools.fetcher.ahead(wanted):
        yield Job(video, found, video.sample.frames, video.cut)


def _add(writer: ShardWriter, video: Pending, captions: Captions | None) -> Sums:
    """Write an entry; what it adds to the sums."""
    sample, cut, latents = video.sample, video.cut, video.latents()
    text = None if captions is None else captions.embedding(sample.caption)
    data = pack_latents(*latents, text, {"frames_left_out": str(cut.left_out)})
    fps, (height, width) = sample.fps / cut.stride, cut.geometry.crop
    described = Described(cut.frames, height, width, fps, sample.source, sample.caption, sample.motion)
    writer.add(NewSample(sample.key, data, described, LATENT_EXTENSION))
    return Sums.of(latents, cut.left_out)


def _guard(tools: Tools, number: int, videos: int, bad: Sequence[Skip]) -> None:
    if len(bad) >= _ENOUGH_TO_JUDGE and len(bad) > tools.max_bad_share * videos:
        name = tools.dataset.manifest.shards[number].name
        raise DataError(
            f"{len(bad)} of {videos} videos in {name} cannot be encoded, more than --max-bad-share "
            f"{tools.max_bad_share:g} allows; run `regen shards verify {tools.dataset.store.url} --deep`, or allow "
            f"more:\n{listed(bad)}"
        )
