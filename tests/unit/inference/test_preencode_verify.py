"""Entries encoded again: a good cache agrees, a wrong entry is named, another config is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.latents import LATENT_EXTENSION, LatentEntry, pack_latents, unpack_latents
from regen_dist.data.format.manifest import write_manifest
from regen_dist.data.format.writing import NewSample, ShardWriter
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from regen_dist.inference import preencode_verify
from regen_dist.inference.preencode import preencode
from regen_dist.inference.preencode_verify import verify_cache
from regen_dist.models.text import TextEncoder
from tests.helpers.checkpoints import saved_run
from tests.helpers.preencoding import StandInText, Video, preencode_config, write_videos

VIDEOS = [Video(12, caption="a red square"), Video(3, caption="a disk"), Video(6), Video(5, caption="a red square")]


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a config's text encoder is."""
    monkeypatch.setattr(TextEncoder, "load", lambda config, device: StandInText())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An embedder, and videos in one shard."""
    folder = tmp_path_factory.mktemp("inputs")
    return saved_run(folder).folder, write_videos(folder, VIDEOS, samples_per_shard=8)


@pytest.fixture(scope="module")
def made(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> PreencodeConfig:
    """The config of a cache that is made."""
    config = preencode_config(*inputs, tmp_path_factory.mktemp("made"), batch_clips=3, text={"encoder": "stand-in"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "load", lambda config, device: StandInText())
        preencode(config)
    return config


@pytest.fixture
def config(made: PreencodeConfig, tmp_path: Path) -> PreencodeConfig:
    """Of a copy of it, which may be changed."""
    shutil.copytree(made.output, tmp_path / "out")
    return made.model_copy(update={"output": str(tmp_path / "out")})


def test_a_good_cache_agrees(config: PreencodeConfig) -> None:
    """Though other clips were in the batches."""
    told: list[tuple[str, int, int]] = []
    verdict = verify_cache(config, progress=lambda *each: told.append(each))
    assert (verdict.entries, verdict.mismatches) == (4, ())
    assert verdict.largest < 2**-7
    assert told[-1] == ("verify", 4, 4)


def test_a_cache_of_two_kinds_of_machines_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of bf16 computes in float32 on a CPU without bf16 instructions: the values differ by the rounding, which
    is less than half of what is allowed. One shard is made on either machine, both are verified on both."""
    embedder = saved_run(tmp_path, engine__precision="bf16").folder
    config = preencode_config(embedder, write_videos(tmp_path, VIDEOS, samples_per_shard=2), tmp_path / "out")

    def move_to_machine(*, is_native: bool) -> None:
        monkeypatch.setattr("regen_dist.observe.hardware.has_native_bf16", lambda: is_native)

    for number, is_native in enumerate((True, False)):
        move_to_machine(is_native=is_native)
        made = preencode(config, task=(number, 2))
    assert made.manifest is not None
    allowed = preencode_verify.RELATIVE, preencode_verify.ABSOLUTE["bf16"]
    for share, agrees in ((1 / 2, True), (0, False)):
        monkeypatch.setattr(preencode_verify, "RELATIVE", allowed[0] * share)
        monkeypatch.setitem(preencode_verify.ABSOLUTE, "bf16", allowed[1] * share)
        for is_native in (True, False):
            move_to_machine(is_native=is_native)
            assert (verify_cache(config).mismatches == ()) is agrees


def test_the_seed_draws_the_entries(config: PreencodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    compare = preencode_verify._compare

    def watched(*arguments: Any) -> float:
        drawn.append(arguments[-1].key)
        return float(compare(*arguments))

    monkeypatch.setattr(preencode_verify, "_compare", watched)
    for seed in (0, 0, 1, 2, 3):
        assert verify_cache(config, samples=2, seed=seed).entries == 2
    pairs = [tuple(drawn[start : start + 2]) for start in range(0, 10, 2)]
    assert pairs[0] == pairs[1]
    assert len(set(pairs)) > 1
    assert all(len(set(pair)) == 2 for pair in pairs)


def _rewrite(out: Path, key: str, change: Callable[[LatentEntry], LatentEntry]) -> None:
    """Replace one entry by another whose checksums are all in order."""
    cache, stem = open_dataset(out), "latents-000000"
    samples = [cache.sample(row) for row in range(len(cache))]
    entries = {sample.key: unpack_latents(cache.read(sample)) for sample in samples}
    entries[key] = change(entries[key])
    with ShardWriter(Store(out), stem) as writer:
        for sample in samples:
            entry = entries[sample.key]
            data = pack_latents(entry.content, entry.motion, entry.text, entry.metadata)
            described = SampleFacts(
                sample.frames, sample.height, sample.width, sample.fps, sample.source, sample.caption
            )
            writer.add(NewSample(sample.key, data, described, LATENT_EXTENSION))
    write_manifest(Store(out), [f"{stem}-000000.parquet"], "latents", cache.manifest.options)


def _flipped(entry: LatentEntry) -> LatentEntry:
    motion = entry.motion.clone()
    motion.view(-1)[7] *= -1
    return entry._replace(motion=motion)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_flipped, "1 of 256 values of motion differ"),
        (lambda entry: entry._replace(content=entry.content.roll(1, 0)), "values of content differ"),
        (lambda entry: entry._replace(text=entry.text + 1), "values of text differ"),
        (lambda entry: entry._replace(text=entry.text[:1]), r"text is \[1, 4\] and is made as \[4, 4\] now"),
        (lambda entry: entry._replace(content=entry.content * torch.nan), "values of content differ"),
    ],
)
def test_a_wrong_entry_is_named(config: PreencodeConfig, tmp_path: Path, change: Any, told: str) -> None:
    _rewrite(tmp_path / "out", "video-0", change)
    verdict = verify_cache(config)
    (mismatch,) = verdict.mismatches
    assert mismatch.startswith("sample video-0 in latents-000000-000000.tar: ")
    assert re.search(told, mismatch)


def test_bytes_that_were_changed_are_named(config: PreencodeConfig, tmp_path: Path) -> None:
    cache = open_dataset(tmp_path / "out")
    sample = cache.sample(2)
    path = tmp_path / "out" / sample.shard
    data = bytearray(path.read_bytes())
    data[sample.offset + sample.size - 1] ^= 1
    path.write_bytes(data)
    (mismatch,) = verify_cache(config).mismatches
    assert "sample video-2" in mismatch
    assert "the bytes differ" in mismatch


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weights": "plain"}, "encoder.fingerprint"),
        ({"stride": 2}, "preprocessing.stride: 1 there, 2 now"),
        ({"text": None}, "text: "),
    ],
)
def test_a_cache_of_something_else_is_refused(config: PreencodeConfig, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=named):
        verify_cache(config.model_copy(update=changes))


def test_a_cache_that_is_not_finished_is_refused(config: PreencodeConfig, tmp_path: Path) -> None:
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not finished; run the same without --verify"):
        verify_cache(config)
