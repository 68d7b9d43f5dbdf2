"""Pre-encoding of a dataset of videos into a cache of latents and text embeddings.

A cache is a dataset (data/format) of kind "latents": one shard for each shard of videos, one entry for each video.
Pre-encoding is resumable: finished shards stay, missing ones are made, and the manifest is written last. Several tasks,
also on several machines, can share the shards.
"""

from __future__ import annotations

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.format.catalogue import Dataset
from regen_dist.data.format.index import Sample, SampleFacts, read_index, samples_of
from regen_dist.data.format.latents import LATENT_EXTENSION, NULL_TEXT, pack_latents, pack_null_text, unpack_null_text
from regen_dist.data.format.manifest import (
    PLAN,
    DatasetManifest,
    Skip,
    changes,
    claim,
    finished_manifest,
    listed,
    read_all,
    read_plan,
    to_json,
    write_manifest,
)
from regen_dist.data.format.writing import NewSample, ShardLimits, ShardWriter, index_name
from regen_dist.data.loading.fetch import Fetcher, SampleLocation
from regen_dist.data.pool import Progress, share_of
from regen_dist.data.storage.connection import limits_of
from regen_dist.data.storage.store import Store
from regen_dist.errors import CheckpointError, DataError
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.latent_space import LatentSpread, LatentStatistics, added
from regen_dist.inference.preencode_clips import (
    KIND,
    NO_CUT,
    Batches,
    DecodeJob,
    Decoders,
    Inputs,
    Pending,
    count_clips,
    cut_video,
    fingerprint_of,
    open_inputs,
)
from regen_dist.models.encoder import Latents
from regen_dist.models.text import TextEncoder
from regen_dist.shared_files import IDLE_S, remove_leftovers

# Text embeddings of the captions of one shard.
#
# Legend: L tokens, D their width.

_TOGETHER = 32  # captions passed to the encoder at a time
_MAX_EMBEDDINGS = 1024  # embeddings kept for repeated captions: 2 GB at 256 tokens of width 4096


class Captions:
    """Embedder of captions that works a few captions ahead, and embeds each once while it is held.

    Args:
        encoder: text encoder; embeds each caption independently of the others.
        captions: captions that will be requested, in that order.
        null: the embedding of the empty caption [L, D], for videos that have none.
    """

    def __init__(self, encoder: TextEncoder, captions: Iterable[str | None], null: Tensor) -> None:
        self._encoder, self._null = encoder, null
        self._captions = list(dict.fromkeys(caption for caption in captions if caption))
        self._positions = {caption: start for start, caption in enumerate(self._captions)}
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    def embedding(self, caption: str | None) -> Tensor:
        """Return the embedding of one of the captions: bf16 [L, D] on the CPU."""
        if not caption:
            return self._null
        if caption not in self._embeddings:
            self._embed(self._positions[caption])
        return self._embeddings[caption]

    def cuts(self, caption: str | None) -> bool:
        """Return whether a caption has more tokens than are kept."""
        return bool(caption) and self._encoder.cuts(caption or "")

    def _embed(self, start: int) -> None:
        some = self._captions[start : start + _TOGETHER]
        for caption, text in zip(some, self._encoder.encode(some), strict=True):
            self._embeddings[caption] = as_stored(text)
        while len(self._embeddings) > _MAX_EMBEDDINGS:
            self._embeddings.popitem(last=False)


def as_stored(text: Tensor) -> Tensor:
    """Convert an embedding to the form stored in a cache; CheckpointError where it is not finite."""
    stored = text.detach().to("cpu", torch.bfloat16)
    if not bool(torch.isfinite(stored).all()):
        raise CheckpointError("the text encoder gives embeddings that are not finite; its weights are broken")
    return stored


# Sums over the entries of a cache: statistics of its latents, and frames that are in no clip.
#
# Each shard has its own sums, which are added in the order of the shards, so that the numbers are the same, bit for
# bit, however many tasks shared the work.

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over some entries. `images` covers what training uses as images: the first content latent of every entry."""

    clips: LatentSpread | None = None
    images: LatentSpread | None = None
    frames_left_out: int = 0

    @classmethod
    def of(cls, latents: Latents, left_out: int) -> Sums:
        """Compute the sums of one stored entry: latents [n, C, h, w], the motion of an image [0, C, h, w]."""
        first = Latents(latents.content[:1], latents.motion[:0])
        clips = LatentSpread.of(latents) if len(latents.motion) else None
        return cls(clips, LatentSpread.of(first, images=True), left_out)

    def __add__(self, other: Sums) -> Sums:
        left_out = self.frames_left_out + other.frames_left_out
        return Sums(added(self.clips, other.clips), added(self.images, other.images), left_out)

    def to_bytes(self) -> bytes:
        """Serialise to JSON; equal numbers give equal bytes."""
        spreads = {"clips": self.clips, "images": self.images}
        found: dict[str, Any] = {name: spread and spread.to_json() for name, spread in spreads.items()}
        return to_json({"format": _FORMAT, "frames_left_out": self.frames_left_out, **found})


def sums_name(stem: str) -> str:
    """File name of a shard's sums."""
    return f"{stem}.statistics.json"


def read_sums(store: Store, stem: str, data: bytes) -> Sums:
    """Parse the output of `Sums.to_bytes`.

    Raises:
        DataError: the data is damaged.
    """
    try:
        found = json.loads(data)
        if found["format"] != _FORMAT:
            raise ValueError(f"it has format {found['format']}, this version reads {_FORMAT}")
        clips, images = (found[name] and LatentSpread.from_json(found[name]) for name in ("clips", "images"))
        return Sums(clips, images, int(found["frames_left_out"]))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{store.url}/{sums_name(stem)}: damaged ({type(error).__name__}: {error}); remove it, and run the same "
            "again"
        ) from error


# One shard of a cache, made from one shard of videos: the same keys in the same order, always from the beginning.

_ENOUGH_TO_JUDGE = 20  # bad videos in one shard before their share is judged
_ONE_SHARD = ShardLimits(size_bytes=sys.maxsize)


class Tools(NamedTuple):
    """Everything needed to encode a shard. `text` is the text encoder and the empty caption's embedding, or None."""

    config: PreencodeConfig
    dataset: Dataset
    encoder: FrozenEncoder
    text: tuple[TextEncoder, Tensor] | None
    fetcher: Fetcher
    decoders: Decoders
    max_bad_share: float


class EncodedCounts(NamedTuple):
    """Numbers of encoded clips and images, and of captions with more tokens than are kept."""

    clips: int = 0
    images: int = 0
    captions_cut: int = 0

    def plus(self, other: EncodedCounts) -> EncodedCounts:
        return EncodedCounts(*map(add, self, other))


def stem_of(number: int) -> str:
    """Common stem of the output files of a source shard."""
    return f"latents-{number:06d}"


def samples_in(dataset: Dataset, number: int) -> list[Sample]:
    """Read the index entries of a dataset's shard."""
    return samples_of(dataset.index(number))


def encode_shard(tools: Tools, number: int, store: Store, report_progress: Callable[[int], None]) -> EncodedCounts:
    """Make the shard of source shard `number`: its tar, its sums, and last its index.

    Args:
        store: destination of the cache.
        report_progress: called with the number of clips and images that are done or cannot be encoded.

    Raises:
        DataError: more videos than `max_bad_share` cannot be encoded; the store does not answer.
        CheckpointError: a latent is not finite.
    """
    samples = samples_in(tools.dataset, number)
    captions = None if tools.text is None else Captions(tools.text[0], (s.caption for s in samples), tools.text[1])
    sums, encoded, bad = Sums(), EncodedCounts(), list[Skip]()
    with ShardWriter(store, stem_of(number), _ONE_SHARD) as writer:
        for video in _encoded(tools, number, [_pending(sample, tools) for sample in samples]):
            report_progress(video.cut.parts)
            if video.problem is not None:
                bad.append(Skip(source=video.sample.key, reason=video.problem))
                writer.skip(bad[-1])
                continue
            sums += _add(writer, video, captions)
            is_cut = captions is not None and captions.cuts(video.sample.caption)
            encoded = encoded.plus(EncodedCounts(video.cut.clips, int(video.cut.is_image), int(is_cut)))
        _guard(tools, number, len(samples), bad)
        store.put(sums_name(stem_of(number)), sums.to_bytes())
    return encoded


def _pending(sample: Sample, tools: Tools) -> Pending:
    try:
        return Pending(sample, cut_video(sample, tools.config, tools.encoder.num_frames))
    except DataError as error:
        return Pending(sample, NO_CUT, problem=str(error))


def _encoded(tools: Tools, number: int, videos: Sequence[Pending]) -> Iterator[Pending]:
    """Yield the videos in order, each with its latents or a problem."""
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


def _jobs(tools: Tools, number: int, videos: Sequence[Pending]) -> Iterator[DecodeJob[Pending]]:
    first = int(np.sum([shard.samples for shard in tools.dataset.manifest.shards[:number]], dtype=np.int64))
    wanted = (
        (video, [SampleLocation(0, tools.dataset.row(first + place))])
        for place, video in enumerate(videos)
        if video.problem is None
    )
    for video, (found,) in tools.fetcher.ahead(wanted):
        yield DecodeJob(video, found, video.sample.frames, video.cut)


def _add(writer: ShardWriter, video: Pending, captions: Captions | None) -> Sums:
    sample, cut, latents = video.sample, video.cut, video.latents()
    text = None if captions is None else captions.embedding(sample.caption)
    data = pack_latents(*latents, text, {"frames_left_out": str(cut.left_out)})
    fps, (height, width) = sample.fps / cut.stride, cut.geometry.crop
    described = SampleFacts(cut.frames, height, width, fps, sample.source, sample.caption, sample.motion)
    writer.add(NewSample(sample.key, data, described, LATENT_EXTENSION, id=sample.id))
    return Sums.of(latents, cut.left_out)


def _guard(tools: Tools, number: int, videos: int, bad: Sequence[Skip]) -> None:
    if len(bad) >= _ENOUGH_TO_JUDGE and len(bad) > tools.max_bad_share * videos:
        name = tools.dataset.manifest.shards[number].name
        raise DataError(
            f"{len(bad)} of {videos} videos in {name} cannot be encoded, more than --max-bad-share "
            f"{tools.max_bad_share:g} allows; run `regen shards verify {tools.dataset.store.url} --deep`, or allow "
            f"more:\n{listed(bad)}"
        )


# Tracking of finished shards, and the summary of a cache once all of its shards are made.

STATISTICS = "statistics.json"
_PIXEL_BYTES = 3


def unfinished(store: Store, numbers: Sequence[int]) -> list[int]:
    """Source shards whose output is incomplete. Complete means that index and sums exist, and the tar file has the size
    that the index records."""
    found = store.list("latents-")
    begun = [number for number in numbers if {_index(number), sums_name(stem_of(number))} <= found.keys()]
    whole = set()
    for number, (_, data) in zip(begun, read_all(store, [_index(number) for number in begun]), strict=True):
        try:
            facts = read_index(data)[1]
        except DataError:
            continue  # damaged: made again
        if not facts["size"] or found.get(facts["name"]) == facts["size"]:
            whole.add(number)
    return [number for number in numbers if number not in whole]


def write_cache_manifest(
    store: Store, dataset: Dataset, identity: Mapping[str, Any], encoder: FrozenEncoder, text: TextEncoder | None
) -> DatasetManifest:
    """Combine the facts of all shards, and write the statistics and the manifest.

    Raises:
        DataError: no entry is left, or a file is damaged.
    """
    numbers = range(len(dataset.manifest.shards))
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


def _index(number: int) -> str:
    return index_name(stem_of(number), 0)


def _sums(store: Store, numbers: Sequence[int]) -> Sums:
    """Sums over all shards, added in the order of the shards, because rounding depends on the order."""
    names = [sums_name(stem_of(number)) for number in numbers]
    parts = zip(numbers, read_all(store, names), strict=True)
    return reduce(add, (read_sums(store, stem_of(number), data) for number, (_, data) in parts), Sums())


def _of_entries(store: Store, numbers: Sequence[int], dataset: Dataset) -> dict[str, Any]:
    """Median frame rate of the clips (of the images, where there are no clips), and source and pixel bytes.

    Raises:
        DataError: a shard does not account for every sample of its source shard, as an entry or as left out.
    """
    rates, still_rates, pixels = [np.empty(0)], [np.empty(0)], 0
    indices = read_all(store, [_index(number) for number in numbers])
    for source, (name, data) in zip(dataset.manifest.shards, indices, strict=True):
        table, facts = read_index(data)
        if (accounted := table.num_rows + len(facts["skipped"])) != source.samples:
            raise DataError(
                f"{store.url}/{name}: accounts for {accounted} videos, {source.name} holds {source.samples}; remove "
                f"{name} and run the same again, which makes that shard anew"
            )
        fps, frames = table["fps"].to_numpy(), table["frames"].to_numpy().astype(np.int64)
        rates.append(fps[frames > 1])
        still_rates.append(fps[frames == 1])
        pixels += int((frames * table["height"].to_numpy() * table["width"].to_numpy()).sum())
    found = np.concatenate(rates) if any(map(len, rates)) else np.concatenate(still_rates)
    if not len(found):
        raise DataError(f"{store.url}: no video could be encoded; the indices there say why each was left out")
    sizes = {"source_bytes": dataset.manifest.totals.bytes, "pixel_bytes": _PIXEL_BYTES * pixels}
    # Of two rates in the middle the lower one: their mean would be the rate of no video.
    return {"fps": float(np.quantile(found, 0.5, method="lower")), "sizes": sizes}


# Claiming a cache's folder, and checking that its content was made from these very videos.
#
# Earlier versions recorded only the bytes of the videos, neither captions nor shards. Their caches are read
# and finished like others once their entries have been compared with the videos' indices.

_OLD_SOURCE = {"fingerprint"}  # keys that caches of earlier versions recorded about their videos
_NAMED = 3


def claim_cache(store: Store, inputs: Inputs) -> None:
    """Claim the folder for this cache, as `claim` does. A plan of an earlier version is updated if everything in the
    folder was made from these videos.

    Raises:
        DataError: the folder holds something else.
    """
    plan = read_plan(store)
    if plan is not None and _is_old(plan.get("source")):
        source = check_source(store, plan["source"], inputs)
        if not changes(plan, inputs.identity | {"source": source}):
            store.put(PLAN, to_json(inputs.identity))
    claim(store, inputs.identity, by="regen preencode", out="output")


def check_source(store: Store, recorded: Any, inputs: Inputs) -> dict[str, Any]:
    """Return the part of the identity that a cache's record of its videos must equal.

    Raises:
        DataError: the cache is from an earlier version and records the same bytes, but its entries are of other videos.
    """
    source: dict[str, Any] = inputs.identity["source"]
    if not _is_old(recorded):
        return source
    if recorded["fingerprint"] == source["fingerprint"]:
        check_entries(store, inputs.dataset)
    return {"fingerprint": source["fingerprint"]}


def check_entries(store: Store, dataset: Dataset) -> None:
    """Raise DataError unless each finished shard holds exactly the videos of its source shard with their captions."""
    suffix, shards = "-000000.parquet", dataset.manifest.shards
    names = [name for name in store.list("latents-") if name.endswith(suffix)]
    for name, data in read_all(store, names):
        number = int(name.removesuffix(suffix).removeprefix(stem_of(0)[:-6]))
        table, facts = read_index(data)
        made = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
        left_out = {skip["source"] for skip in facts["skipped"]}
        videos = {each.key: each.caption for each in samples_in(dataset, number)} if number < len(shards) else {}
        wrong = sorted((made.keys() | left_out) ^ videos.keys())
        what = "is of other videos"
        if not wrong:
            wrong = [key for key, caption in made.items() if caption != videos[key]]
            what = "has other captions"
        if wrong:
            raise DataError(
                f"{store.url}/{name}: {what} than shard {number} of {dataset.store.url} ({', '.join(wrong[:_NAMED])}"
                f"{', …' if len(wrong) > _NAMED else ''}), so the videos were built again since; give another output, "
                "or remove this cache. Nothing was changed"
            )


def _is_old(recorded: Any) -> bool:
    return isinstance(recorded, dict) and recorded.keys() == _OLD_SOURCE


MAX_BAD_SHARE = 0.5


class Preencoded(NamedTuple):
    """Result of a call: the manifest, or None while other tasks still have shards to make; the shards, clips and images
    that this call made, and its seconds; the total number of shards and the number missing."""

    manifest: DatasetManifest | None
    shards_made: int
    shards: int
    shards_missing: int
    encoded: EncodedCounts = EncodedCounts()
    seconds: float = 0.0

    @property
    def clips_per_s(self) -> float:
        """Clips and images per second of this call, including reading and writing."""
        return (self.encoded.clips + self.encoded.images) / self.seconds if self.seconds else 0.0


def preencode(
    config: PreencodeConfig,
    *,
    task: tuple[int, int] = (0, 1),
    max_bad_share: float = MAX_BAD_SHARE,
    progress: Progress = lambda stage, done, total: None,
) -> Preencoded:
    """Make (or finish) the cache of a dataset.

    Args:
        config: input, models and output; `output` is empty, or was begun with the same config, weights and videos.
        task: (i, n): make the shards of every n-th source shard from the i-th (from 0). The call that finds all shards
            made writes the manifest.
        max_bad_share: stop when at least 20 videos of a shard, and more than this share of them, cannot be encoded.
        progress: called with ("encode", done, total) in clips and images of this task.

    Raises:
        DataError: the videos cannot be read, or have no captions; `output` holds something else; there is no such task;
                no entry is left.
            CheckpointError: the embedder has no usable checkpoint.
            ConfigError: the given embedder is not an embedder.
    """
    inputs, store = open_inputs(config), Store(config.output, limits_of(config.read))
    numbers = range(len(inputs.dataset.manifest.shards))
    mine = share_of(numbers, task)
    claim_cache(store, inputs)
    if store.folder is not None:
        remove_leftovers(store.folder, idle_s=IDLE_S if task[1] > 1 else 0)
    todo = unfinished(store, mine)
    began = time.perf_counter()
    with _tools(config, inputs, store, max_bad_share) as tools:
        encoded = _encode(tools, store, todo, progress)
    done = Preencoded(None, len(todo), len(numbers), 0, encoded, time.perf_counter() - began)
    return _finish(done, inputs, store)


@contextmanager
def _tools(config: PreencodeConfig, inputs: Inputs, store: Store, max_bad_share: float) -> Iterator[Tools]:
    """Load the encoders; write the embedding of the empty caption first."""
    text = None
    if inputs.text is not None:
        text = inputs.text, as_stored(inputs.text.null())
        _write_null_text(store, pack_null_text(text[1]))
    with Fetcher([inputs.dataset], config.read) as fetcher, Decoders() as threads:
        yield Tools(config, inputs.dataset, inputs.encoder, text, fetcher, threads, max_bad_share)


def _write_null_text(store: Store, data: bytes) -> None:
    """Write the embedding of the empty caption, unless there is one that can be read: that of another GPU may differ in
    its last bits."""
    if store.put_new(NULL_TEXT, data):
        return
    found = store.get(NULL_TEXT)
    try:
        unpack_null_text(found)
    except DataError:
        store.put(NULL_TEXT, data)


def _encode(tools: Tools, store: Store, todo: Sequence[int], progress: Progress) -> EncodedCounts:
    total, done, encoded = _units(tools, todo), 0, EncodedCounts()

    def report_progress(units: int) -> None:
        nonlocal done
        done += units
        progress("encode", done, total)

    for number in todo:
        made = encode_shard(tools, number, store, report_progress)
        encoded = encoded.plus(made)
    return encoded


def _units(tools: Tools, todo: Sequence[int]) -> int:
    """Number of clips and images in these source shards, from the index."""
    frames = tools.dataset.records["frames"]
    starts = np.cumsum([0, *(entry.samples for entry in tools.dataset.manifest.shards)])
    parts = [frames[starts[number] : starts[number + 1]].astype(np.int64) for number in todo]
    counts = [np.maximum(1, count_clips(part, tools.config, tools.encoder.num_frames)) for part in parts]
    return sum(int(each.sum()) for each in counts)


def _finish(done: Preencoded, inputs: Inputs, store: Store) -> Preencoded:
    """Write the manifest when nothing is missing. Tasks that end together may each write it: it is the same one."""
    missing = len(unfinished(store, range(done.shards)))
    if missing:
        return done._replace(shards_missing=missing)
    if not done.shards_made and (found := finished_manifest(store)) is not None:
        return done._replace(manifest=found)
    manifest = write_cache_manifest(store, inputs.dataset, inputs.identity, inputs.encoder, inputs.text)
    return done._replace(manifest=manifest)
