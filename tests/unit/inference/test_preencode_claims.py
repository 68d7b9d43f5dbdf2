"""Which caches are gone on with: those of these very videos, captions and shards, also when an earlier version wrote
them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.manifest import described, read_manifest, to_json, write_manifest
from regen_dist.data.format.writing import NewSample, ShardLimits, ShardWriter, index_name
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from regen_dist.inference.preencode import preencode
from regen_dist.inference.preencode_verify import verify_cache
from regen_dist.models.text import TextEncoder
from tests.helpers.checkpoints import saved_run
from tests.helpers.datasets import objects
from tests.helpers.preencoding import StandInText, Video, preencode_config, write_videos

TEXT = {"encoder": "stand-in", "max_tokens": 8}
VIDEOS = [Video(6, caption=f"square {number}") for number in range(7)]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("runs")).folder


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextEncoder, "load", lambda config, device: StandInText())


@pytest.fixture(scope="module")
def made(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven captioned videos in shards of two, and their cache. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("made")
    write_videos(folder, VIDEOS, samples_per_shard=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "load", lambda config, device: StandInText())
        preencode(preencode_config(embedder, folder / "shards", folder / "cache", text=TEXT))
    return folder


@pytest.fixture
def config(made: Path, embedder: Path, tmp_path: Path) -> PreencodeConfig:
    """Config that encodes a copy of the videos."""
    shutil.copytree(made / "shards", tmp_path / "shards")
    return preencode_config(embedder, tmp_path / "shards", tmp_path / "cache", text=TEXT)


@pytest.fixture
def encoded(made: Path, config: PreencodeConfig) -> PreencodeConfig:
    """The same, with the cache."""
    shutil.copytree(made / "cache", config.output)
    return config


def _rebuild(
    config: PreencodeConfig,
    change: Callable[[SampleFacts], SampleFacts] = lambda said: said,
    samples_per_shard: int = 2,
) -> None:
    """Write the dataset again at its path, of the same videos."""
    dataset = open_dataset(config.data)
    samples = [dataset.sample(row) for row in range(len(dataset))]
    videos = [dataset.read(sample) for sample in samples]
    shutil.rmtree(config.data)
    store = Store(config.data)
    with ShardWriter(store, "part", ShardLimits(samples=samples_per_shard)) as writer:
        for one, data in zip(samples, videos, strict=True):
            said = SampleFacts(one.frames, one.height, one.width, one.fps, one.source, one.caption, one.motion)
            writer.add(NewSample(one.key, data, change(said)))
    write_manifest(store, [index_name("part", number) for number in range(writer.shards)], "synthetic", {})


def _another_caption(said: SampleFacts) -> SampleFacts:
    return replace(said, caption="a circle") if said.caption == "square 4" else said


def _no_caption(said: SampleFacts) -> SampleFacts:
    return replace(said, caption=None) if said.caption == "square 4" else said


def _swapped(said: SampleFacts) -> SampleFacts:
    """Captions in another order, of the same lengths."""
    return replace(said, caption={"square 3": "square 4", "square 4": "square 3"}.get(said.caption or "", said.caption))


def _as_before(folder: str | Path, *names: str) -> None:
    """Bring files of a cache into the form that earlier versions wrote: the source by its fingerprint alone."""
    for name in names:
        content = json.loads((Path(folder) / name).read_bytes())
        place = content if name == "plan.json" else content["options"]
        place["source"] = {"fingerprint": place["source"]["fingerprint"]}
        content.pop("described", None)
        (Path(folder) / name).write_bytes(to_json(content))


@pytest.mark.parametrize(
    ("change", "old"), [(_another_caption, False), (_no_caption, False), (_swapped, False), (_swapped, True)]
)
def test_a_dataset_with_another_caption_is_refused(
    encoded: PreencodeConfig, change: Callable[[SampleFacts], SampleFacts], old: bool
) -> None:
    if old:
        _as_before(encoded.output, "plan.json", "manifest.json")
    before = objects(encoded.output)
    _rebuild(encoded, change)
    with pytest.raises(DataError, match="has other captions" if old else r"source\.captions: .* there, .* now"):
        preencode(encoded)
    with pytest.raises(DataError, match=r"has other captions|source\.captions"):
        verify_cache(encoded, samples=2)
    assert objects(encoded.output) == before


@pytest.mark.parametrize(
    ("tasks", "samples_per_shard", "old"),
    [((0,), 1, False), ((0,), 3, True), ((0, 1, 2, 3), 7, False), ((0, 1, 2, 3), 1, True)],
)
def test_other_shards_are_refused(
    config: PreencodeConfig, tasks: Sequence[int], samples_per_shard: int, old: bool
) -> None:
    """One task of four, then the dataset in other shards: before, samples went missing without a word."""
    for task in tasks:
        preencode(config, task=(task, 4))
    if old:
        _as_before(config.output, "plan.json", *(["manifest.json"] if len(tasks) > 1 else []))
    before = objects(config.output)
    _rebuild(config, samples_per_shard=samples_per_shard)
    with pytest.raises(DataError, match="is of other videos" if old else r"source\.shards: .* there, .* now"):
        preencode(config)
    assert objects(config.output) == before


def test_motion_and_rates_that_the_cache_holds_are_compared(encoded: PreencodeConfig) -> None:
    _rebuild(encoded, lambda said: replace(said, motion=0.25))
    with pytest.raises(DataError, match=r"source\.facts: "):
        preencode(encoded)


def test_the_same_dataset_built_again_is_the_same(encoded: PreencodeConfig) -> None:
    before = objects(encoded.output)
    _rebuild(encoded)
    assert preencode(encoded).shards_made == 0
    assert objects(encoded.output) == before


def test_caches_of_an_earlier_version_are_finished_and_verified(config: PreencodeConfig) -> None:
    """Their plan is brought up to date when what they hold is of these videos."""
    preencode(config, task=(1, 4))
    plan = (Path(config.output) / "plan.json").read_bytes()
    _as_before(config.output, "plan.json")
    assert preencode(config).shards_made == 3
    assert (Path(config.output) / "plan.json").read_bytes() == plan
    _as_before(config.output, "plan.json", "manifest.json")
    assert verify_cache(config, samples=2).mismatches == ()
    done = preencode(config)
    assert (done.shards_made, done.manifest and done.manifest.totals.samples) == (0, 7)


def test_datasets_of_an_earlier_version_are_described_by_their_indices(config: PreencodeConfig) -> None:
    """So that a manifest that does not hold it gives the same identity."""
    store = Store(config.data)
    now = read_manifest(store)
    content = json.loads(store.get("manifest.json"))
    assert content.pop("described") == described(store, now).model_dump()
    store.put("manifest.json", to_json(content))
    assert described(store, read_manifest(store)) == now.described
    preencode(config)
    _rebuild(config)
    assert preencode(config).shards_made == 0


def test_what_is_said_does_not_depend_on_shards_and_tells_texts_apart(config: PreencodeConfig) -> None:
    manifest = read_manifest(Store(config.data))
    _rebuild(config, samples_per_shard=5)
    other = read_manifest(Store(config.data))
    assert (other.described, other.fingerprint) == (manifest.described, manifest.fingerprint)
    assert other.boundaries() != manifest.boundaries()
    seen = set()
    for captions in (["a", "bc"], ["ab", "c"], ["", "abc"], [None, "abc"], ["abc", None]):
        _rebuild(config, lambda said, captions=captions: replace(said, caption=captions[said.source == "1.mp4"]))  # type: ignore[misc]
        made = read_manifest(Store(config.data)).described
        assert made is not None
        seen.add(made.captions)
    assert len(seen) == 5


def test_an_index_that_was_replaced_meanwhile_is_not_read(config: PreencodeConfig) -> None:
    """A task that runs while the dataset is built again must not mix the two."""
    dataset = open_dataset(config.data)
    _rebuild(config, _another_caption)
    with pytest.raises(DataError, match="built again meanwhile"):
        dataset.sample(4)


def test_a_cache_that_does_not_account_for_all_videos_is_bad(encoded: PreencodeConfig) -> None:
    verdict = verify_dataset(encoded.output, "quick", workers=0)
    assert (verdict.bad, verdict.notes) == ((), ())
    store = Store(encoded.output)
    content = json.loads(store.get("manifest.json"))
    content["options"]["source"]["samples"] = 9
    store.put("manifest.json", to_json(content))
    assert verify_dataset(encoded.output, "quick", workers=0).bad == (
        "manifest.json: entries and what was left out are 7, the videos were 9",
    )
