"""The latent loader: rows that do not depend on ranks and micro-batches, and items that are made ahead."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.config.datasets import DataConfig
from regen_dist.config.t2v import LatentDataConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.latents import CacheFacts, LatentEntry, unpack_latents
from regen_dist.data.format.manifest import MANIFEST
from regen_dist.data.loading import datasets as module
from regen_dist.data.loading import fetch, latent_loader
from regen_dist.data.loading.datasets import LatentSet, TrainingSet
from regen_dist.data.loading.latent_loader import LatentBatch, in_background, latent_batches
from regen_dist.data.loading.validation import validation_clip, validation_rows
from regen_dist.data.order.order import draw_row
from regen_dist.errors import ConfigError, DataError
from tests.helpers.datasets import flip_byte
from tests.helpers.latents import write_cache

SIZES = ((32, 48), (32, 32))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few entries are fetched before the first batch: these are of some kilobytes each."""
    monkeypatch.setattr(fetch, "_FIRST_WINDOW_BYTES", 1 << 14)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve entries of two sizes: of no clip (an image), one, two and four."""
    return write_cache(tmp_path_factory.mktemp("cache"), videos=12, clips=(1, 2, 0, 4), size=SIZES[:1] * 4 + SIZES[1:])


@pytest.fixture
def config(cache: Path) -> LatentDataConfig:
    return LatentDataConfig.model_validate(
        {"url": str(cache), "clips": [1, 2], "image_fraction": 0.25, "read": {"ahead_mb": 1}}
    )


def made(config: LatentDataConfig, **changes: Any) -> LatentSet:
    return LatentSet(config, **{"batch_global": 8, "seed": 3} | changes)


def read(config: LatentDataConfig, number: int, cursor: int = 0, **changes: Any) -> list[LatentBatch]:
    of_rank: dict[str, Any] = {"accumulation": 1, "rank": 0, "world_size": 1}
    place = {name: changes.pop(name, value) for name, value in of_rank.items()}
    with closing(latent_batches(made(config, **changes), cursor=cursor, **place)) as batches:
        return list(islice(batches, number))


def entries(folder: Path) -> dict[int, LatentEntry]:
    dataset = open_dataset(folder)
    rows = [dataset.row(number) for number in range(len(dataset))]
    return {row.id: unpack_latents(dataset.read(row)) for row in rows}


def assert_equal(found: LatentBatch, expected: LatentBatch) -> None:
    for name in ("content", "motion", "text", "mask", "sample_ids", "epochs"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.bad, found.num_replaced) == (expected.bad, expected.num_replaced)


def joined(parts: list[LatentBatch]) -> LatentBatch:
    """One batch of several; each has its own padding."""
    longest = max(part.mask.shape[1] for part in parts if part.mask is not None)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        more = torch.zeros(len(tensor), longest - tensor.shape[1], *tensor.shape[2:], dtype=tensor.dtype)
        return torch.cat([tensor, more], 1)

    tensors = {name: [getattr(part, name) for part in parts] for name in LatentBatch._fields[:6]}
    tensors |= {name: [padded(tensor) for tensor in tensors[name]] for name in ("text", "mask")}
    return LatentBatch(**{name: torch.cat(values) for name, values in tensors.items()})


def test_there_is_a_bucket_for_every_size_and_number_of_clips(config: LatentDataConfig) -> None:
    data = made(config)
    assert [tuple(bucket) for bucket in data.buckets] == [
        (height, width, frames) for height, width in sorted(SIZES) for frames in (5, 10)
    ] + [(*size, 1) for size in sorted(SIZES)]
    sizes = {tuple(stream.bucket): stream.sizes[0] for stream in data.order.streams}
    assert sizes == {(32, 32, 5): 2, (32, 32, 10): 1, (32, 48, 5): 7, (32, 48, 10): 5, (32, 32, 1): 2, (32, 48, 1): 10}


def test_rows_are_runs_of_clips_of_the_entries(config: LatentDataConfig, cache: Path) -> None:
    stored, data = entries(cache), made(config)
    kinds, starts = Counter[str](), set[int]()
    for batch in read(config, 40):
        n = batch.motion.shape[1]
        kinds[batch.kind] += 1
        assert batch.text is not None
        assert batch.content.dtype == batch.motion.dtype == batch.text.dtype == torch.bfloat16, "as stored"
        assert batch.mask is not None
        assert batch.epochs is not None
        assert batch.mask.sum(1).max() == batch.mask.shape[1], "no longer than the longest"
        for slot, (number, epoch) in enumerate(zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)):
            entry = stored[number]
            first = draw_row(data.seed, epoch, number, entry.clips, n) if n else 0
            starts |= {first} if n == 2 else set()
            assert torch.equal(batch.content[slot], entry.content[first : first + max(n, 1)])
            assert torch.equal(batch.motion[slot], entry.motion[first : first + n])
            assert entry.text is not None
            tokens = len(entry.text)
            assert torch.equal(batch.text[slot, :tokens], entry.text)
            assert batch.mask[slot].tolist() == [True] * tokens + [False] * (batch.mask.shape[1] - tokens)
            assert not batch.text[slot, tokens:].any()
    assert set(kinds) == {"1x4x4", "2x4x4", "1x4x6", "2x4x6", "image 4x4", "image 4x6"}
    assert kinds["image 4x4"] + kinds["image 4x6"] == pytest.approx(10, abs=1), "a quarter of the batches"
    assert starts == {0, 1, 2}, "every place that a row of two clips has among four"


def test_an_image_is_the_first_clips_content(config: LatentDataConfig, cache: Path) -> None:
    only = config.model_copy(update={"image_fraction": 1.0})
    stored = entries(cache)
    seen = set()
    for batch in read(only, 6):
        assert batch.content.shape[1:] == (1, 8, 4, batch.content.shape[4])
        assert batch.motion.shape == (8, 0, 8, 4, batch.content.shape[4])
        for number, content in zip(batch.sample_ids.tolist(), batch.content, strict=True):
            seen.add(number)
            assert torch.equal(content, stored[number].content[:1])
    assert seen == set(stored)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 4), (2, 2)])
def test_ranks_and_accumulation_cut_the_same_global_batches(
    config: LatentDataConfig, world_size: int, accumulation: int
) -> None:
    whole = read(config, 3, cursor=16)
    ranks = [
        read(config, 3 * accumulation, 16, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = [rank[step * accumulation + micro] for micro in range(accumulation) for rank in ranks]
        assert_equal(joined(parts), expected)


def test_a_cursor_goes_on_where_it_stands(config: LatentDataConfig) -> None:
    whole = read(config, 9)
    for found, expected in zip(read(config, 4, cursor=40), whole[5:], strict=True):
        assert_equal(found, expected)


def test_a_row_is_drawn_by_seed_epoch_and_entry() -> None:
    drawn = [draw_row(3, epoch, 77, 8, 2) for epoch in range(200)]
    assert set(drawn) == set(range(7))
    assert drawn == [draw_row(3, epoch, 77, 8, 2) for epoch in range(200)]
    assert drawn != [draw_row(4, epoch, 77, 8, 2) for epoch in range(200)]
    assert drawn != [draw_row(3, epoch, 78, 8, 2) for epoch in range(200)]
    assert draw_row(3, 0, 77, 2, 2) == 0
    with pytest.raises(DataError, match="has 1 clips, a row needs 2"):
        draw_row(3, 0, 77, 1, 2)


def test_what_cannot_be_divided_is_refused_before_reading(config: LatentDataConfig) -> None:
    with pytest.raises(ConfigError, match=r"batch_global 8 over .* not a multiple of 3 ranks; ranks that fit: 1, 2"):
        read(config, 0, world_size=3)
    with pytest.raises(ConfigError, match="cursor"):
        read(config, 0, cursor=12)
    with pytest.raises(ConfigError, match="rank 2"):
        read(config, 0, rank=2, world_size=2)


def test_a_bad_entry_has_the_same_stand_in_on_every_rank(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", videos=8, clips=2)
    config = LatentDataConfig(url=str(folder), clips=(2,))
    clean = read(config, 4)
    damaged = open_dataset(folder).row(5)
    flip_byte(folder / damaged.shard, damaged.offset + damaged.size // 2)
    whole = read(config, 4)
    for found, expected in zip(whole, clean, strict=True):
        assert (found.num_replaced, len(found.bad)) == (1, 1), "eight entries, eight a batch"
        assert found.bad[0].key == "seed0-000005"
        assert "the bytes differ from those that were written" in found.bad[0].reason
        same = found.sample_ids == expected.sample_ids
        assert same.sum() == 7
        assert torch.equal(found.content[same], expected.content[same])
    ranks = [read(config, 4, rank=rank, world_size=4) for rank in range(4)]
    for step, expected in enumerate(whole):
        assert sum(rank[step].num_replaced for rank in ranks) == 1
        assert torch.equal(torch.cat([rank[step].content for rank in ranks]), expected.content)


def test_an_entry_that_is_not_what_the_manifest_says_is_bad(config: LatentDataConfig) -> None:
    """Its bytes are right; its latents have too few channels."""
    data = made(config)
    data.facts = CacheFacts(**vars(data.facts) | {"channels": 16})
    with (
        closing(latent_batches(data, accumulation=1, rank=0, world_size=1, cursor=0)) as batches,
        pytest.raises(DataError, match=r"8 samples were tried in place of .* say \dx16x4x\d"),
    ):
        next(batches)


def test_closing_ends_the_thread(config: LatentDataConfig) -> None:
    def there() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "ahead"]

    batches = latent_batches(made(config), accumulation=1, rank=0, world_size=1, cursor=0)
    next(batches)
    assert there() == ["ahead"]
    batches.close()
    assert there() == []


def test_caches_of_other_latents_are_not_mixed(cache: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other", videos=2, seed=1, fingerprint="another")
    mixture = {"mixture": [{"url": str(cache)}, {"url": str(other)}]}
    with pytest.raises(DataError, match=r"cache.* \(test\), .*other \(another\); their latents do not mean the same"):
        made(LatentDataConfig.model_validate(mixture))
    config = LatentDataConfig(url=str(cache), validation_url=str(other))
    with pytest.raises(DataError, match="made differently"):
        validation_rows(config, made(config).facts)


def test_caches_of_the_same_latents_are_drawn_by_weight(cache: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other", videos=3, seed=1, size=SIZES[1])
    mixture = {"mixture": [{"url": str(cache), "weight": 3}, {"url": str(other), "weight": 1}]}
    config = LatentDataConfig.model_validate(mixture)
    data = made(config)
    assert [each["clips"]["num_clips"] for each in data.statistics] == [21, 3]
    own = set(entries(other))
    drawn = [number in own for batch in read(config, 50) for number in batch.sample_ids.tolist()]
    assert sum(drawn) / len(drawn) == pytest.approx(1 / 4, abs=0.03)


def test_a_cache_is_no_dataset_of_videos_nor_the_other_way_round(cache: Path, tmp_path: Path) -> None:
    videos = DataConfig(url=str(cache), size=(32, 32))
    for opened in (
        lambda: TrainingSet(videos, num_frames=5, batch_global=1, seed=0),
        lambda: validation_clip(videos, num_frames=5),
    ):
        with pytest.raises(DataError, match=r"holds latents that `regen preencode` made, not videos"):
            opened()
    called_videos = json.loads((cache / MANIFEST).read_text()) | {"kind": "build"}
    (Path(shutil.copytree(cache, tmp_path / "videos")) / MANIFEST).write_text(json.dumps(called_videos))
    with pytest.raises(DataError, match=r"holds videos, not latents \(it was made by `regen shards build`\)"):
        made(LatentDataConfig(url=str(tmp_path / "videos")))


def test_entries_too_short_are_left_out_and_told(config: LatentDataConfig) -> None:
    longer = config.model_copy(update={"clips": (2, 4)})
    assert "data: 12 samples in 1 dataset(s), 6 bucket(s); 6 have fewer than 2 clip(s)" in made(longer).summary()
    assert made(longer).summary().endswith("and are used as images only")
    alone = longer.model_copy(update={"image_fraction": 0.0})
    assert made(alone).summary().endswith("and are left out")
    with pytest.raises(DataError, match=r"none of the 12 entries of .* has 5 clip\(s\) of 5 frames; lower data.clips"):
        made(config.model_copy(update={"clips": (5,)}))


def test_too_many_sizes_are_refused(config: LatentDataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_SIZES", 1)
    with pytest.raises(DataError, match=r"latents of 2 different sizes, at most 1 .* pre-encode with `buckets`"):
        made(config)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data.clips": ({"clips": (1,)}, {}),
    "data.image_fraction": ({"image_fraction": 0.5}, {}),
    "data.text_dropout": ({"text_dropout": 0.2}, {}),
    "train.batch_global": ({}, {"batch_global": 16}),
    "train.seed": ({}, {"seed": 4}),
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_what_changes_the_rows_changes_the_identity(config: LatentDataConfig, name: str) -> None:
    of_data, others = OPTIONS[name]
    before, after = made(config).identity(), made(config.model_copy(update=of_data), **others).identity()
    assert [key for key in before if before[key] != after[key]] == [name]


def test_other_latents_change_the_identity(config: LatentDataConfig, tmp_path: Path) -> None:
    before = made(config).identity()
    other = write_cache(tmp_path, videos=12, clips=(1, 2, 0, 4), seed=5)
    after = made(config.model_copy(update={"url": str(other)})).identity()
    changed = [key for key in before if before[key] != after[key]]
    assert changed == ["dataset fingerprint", "frames, sizes and sources of the samples"]


def test_a_cache_without_text(tmp_path: Path) -> None:
    config = LatentDataConfig(url=str(write_cache(tmp_path, videos=2, text_width=None)))
    (batch,) = read(config, 1)
    assert batch.text is batch.mask is made(config).null_text() is None
    assert batch.content.shape == (8, 1, 8, 4, 4)


def test_an_entry_that_comes_twice_in_a_batch_has_two_keys(config: LatentDataConfig) -> None:
    (batch,) = read(config.model_copy(update={"image_fraction": 1.0}), 1, batch_global=24)
    assert len(set(batch.sample_ids.tolist())) < len(set(batch.keys.tolist())) == 24


def test_validation_rows_are_fixed_and_spread(config: LatentDataConfig, cache: Path) -> None:
    facts, stored = made(config).facts, entries(cache)
    found = validation_rows(config, facts, rows=3)
    assert found.batch.kind == "2x4x6", "the most clips that a row may have, in the size that is most frequent"
    assert found.captions == ("a green square", "a yellow square", "a yellow square")
    assert found.fps == (8.0,) * 3
    for number, content in zip(found.batch.sample_ids.tolist(), found.batch.content, strict=True):
        assert torch.equal(content, stored[number].content[:2])
    assert torch.equal(validation_rows(config, facts, rows=3).batch.content, found.batch.content)
    assert len(validation_rows(config, facts, rows=99).batch.content) == 5


def test_validation_data_without_clips_gives_images(config: LatentDataConfig, tmp_path: Path) -> None:
    other = write_cache(tmp_path, videos=3, clips=0)
    apart = config.model_copy(update={"validation_url": str(other)})
    assert validation_rows(apart, made(config).facts).batch.kind == "image 4x4"


def test_training_on_images_alone_is_validated_on_images(config: LatentDataConfig, cache: Path) -> None:
    """First frames, though the cache has clips: the model has never seen a motion latent."""
    found = validation_rows(config.model_copy(update={"image_fraction": 1.0}), made(config).facts, rows=3)
    assert found.batch.kind.startswith("image")
    stored = entries(cache)
    for number, content in zip(found.batch.sample_ids.tolist(), found.batch.content, strict=True):
        assert torch.equal(content, stored[number].content[:1])


def test_a_bad_validation_entry_has_no_stand_in(tmp_path: Path) -> None:
    folder = write_cache(tmp_path, videos=2)
    config = LatentDataConfig(url=str(folder))
    damaged = open_dataset(folder).row(1)
    flip_byte(folder / damaged.shard, damaged.offset)
    with pytest.raises(DataError, match=r"validation entry, row 1 in latents-000000-000000.tar of .*the bytes differ"):
        validation_rows(config, made(config).facts)


# Items made ahead: in order, so many ahead, errors in their turn, and no thread left.


class Source:
    """Numbers, without end or up to a mistake; `made` of them so far, and `more` counts those that no test awaited."""

    def __init__(self, mistake: int | None = None, end: int = 1000) -> None:
        self.made, self.closed, self.more = 0, threading.Event(), threading.Semaphore(0)
        self._mistake, self._end = mistake, end

    def items(self) -> Generator[int]:
        try:
            for number in range(self._end):
                if number == self._mistake:
                    raise ValueError("a mistake")
                self.made += 1
                self.more.release()
                yield number
        finally:
            self.closed.set()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_items_come_in_order_and_to_an_end() -> None:
    assert list(in_background(Source(end=20).items(), 3)) == list(range(20))
    assert threads() == []


def test_so_many_are_made_ahead_and_no_more() -> None:
    source = Source()
    items = in_background(source.items(), 3)
    assert next(items) == 0
    for _ in range(4):  # the one that was taken, and three that wait
        assert source.more.acquire(timeout=60)
    assert not source.more.acquire(timeout=0.2), "a fourth is made while three wait"
    items.close()


def test_nothing_is_made_before_the_first_is_asked_for() -> None:
    source = Source()
    in_background(source.items(), 3).close()
    assert (source.made, threads()) == (0, [])


def test_an_error_comes_in_its_turn() -> None:
    source = Source(mistake=2)
    items = in_background(source.items(), 8)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="a mistake"):
        next(items)
    assert source.closed.is_set()
    assert threads() == []


@pytest.mark.parametrize("taken", [1, 5])
def test_closing_ends_the_thread_and_what_it_reads(taken: int) -> None:
    source = Source()
    items = in_background(source.items(), 2)
    for _ in range(taken):
        next(items)
    assert len(threads()) == 1
    items.close()
    assert source.closed.is_set()
    assert threads() == []


def test_closing_does_not_wait_for_a_read_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_loader, "_ENDING_S", 0.01)
    goes_on, closed = threading.Event(), threading.Event()

    def slow() -> Generator[int]:
        try:
            yield 0
            goes_on.wait(30)
            yield 1
        finally:
            closed.set()

    items = in_background(slow(), 2)
    next(items)
    items.close()
    assert not closed.is_set()
    goes_on.set()
    assert closed.wait(60), "the thread ends as soon as it can"
    for thread in threads():
        thread.join(60)
