"""Entries of latent caches: the same bits come back, equal entries are equal bytes, and what is not one is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.latents import (
    NULL_TEXT,
    CacheFacts,
    pack_latents,
    pack_null_text,
    read_null_text,
    unpack_latents,
)
from regen_dist.data.format.manifest import DatasetManifest
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from tests.helpers.latents import write_cache

WORDS = {"frames_left_out": "3", "weights": "ema", "another": "ü"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(n: int = 2, tokens: int | None = 5) -> bytes:
    text = None if tokens is None else normal(tokens, 16)
    return pack_latents(normal(max(n, 1), 8, 4, 6), normal(n, 8, 4, 6, seed=1), text, WORDS)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("tokens", [None, 1, 5])
def test_the_same_comes_back(n: int, tokens: int | None) -> None:
    entry = unpack_latents(packed(n, tokens))
    assert torch.equal(entry.content, normal(max(n, 1), 8, 4, 6).bfloat16())
    assert torch.equal(entry.motion, normal(n, 8, 4, 6, seed=1).bfloat16())
    assert (entry.clips, entry.metadata) == (n, WORDS)
    if tokens is None:
        assert entry.text is entry.mask is None
    else:
        assert entry.text is not None
        assert entry.mask is not None
        assert torch.equal(entry.text, normal(tokens, 16).bfloat16())
        assert entry.mask.tolist() == [1] * tokens
        assert entry.mask.dtype == torch.uint8


def test_equal_entries_are_equal_bytes() -> None:
    """Safetensors itself writes several words of metadata in an order that changes from call to call."""
    assert len({save({"x": torch.zeros(1)}, WORDS) for _ in range(20)}) > 1
    assert len({packed() for _ in range(20)}) == 1
    assert packed(2) != packed(3)


def test_words_in_another_order_are_the_same_bytes() -> None:
    content = normal(1, 8, 4, 4)
    turned = dict(reversed(WORDS.items()))
    assert pack_latents(content, content, None, WORDS) == pack_latents(content, content, None, turned)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("content"), "no tensor 'content'"),
        (without("motion"), "no tensor 'motion'"),
        (without("mask"), "no tensor 'mask'"),
        (without("text"), "no tensor 'text'"),
        (replaced("content", Tensor.float), r"tensor 'content' is torch.float32, expected is torch.bfloat16"),
        (replaced("mask", Tensor.bool), "tensor 'mask' is torch.bool"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "tensor 'more'.*no such tensor"),
        (replaced("content", lambda t: t[0]), "'content' has the shape 8x4x6, expected are 4"),
        (replaced("motion", lambda t: t[:1]), "content 2x8x4x6 and motion 1x8x4x6 do not belong together"),
        (replaced("motion", lambda t: t[..., :1]), "do not belong together"),
        (replaced("text", lambda t: t[:3]), "text 3x16 and mask 5 do not belong together"),
    ],
)
def test_what_is_no_entry_is_refused(change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    tensors = load(packed())
    change(tensors)
    with pytest.raises(DataError, match=message):
        unpack_latents(save(tensors))


@pytest.mark.parametrize("damaged", [b"", b"{}", packed()[:-1], packed() + b"0", b"\xff" * 8 + packed()[8:]])
def test_damaged_bytes_are_refused(damaged: bytes) -> None:
    with pytest.raises(DataError, match="not a safetensors file, or a damaged one"):
        unpack_latents(damaged)


def test_metadata_of_another_kind_is_refused() -> None:
    for words in ("[", "[1]"):
        with pytest.raises(DataError, match="metadata"):
            unpack_latents(save(load(packed()), {"regen": words}))
    assert unpack_latents(save(load(packed()))).metadata == {}


def test_what_does_not_belong_together_is_not_packed() -> None:
    with pytest.raises(DataError, match="do not belong together"):
        pack_latents(normal(2, 8, 4, 4), normal(0, 8, 4, 4))
    with pytest.raises(DataError, match="at least one token"):
        pack_latents(normal(1, 8, 4, 4), normal(1, 8, 4, 4), normal(0, 16))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"), videos=2)


def facts_of(folder: Path) -> CacheFacts:
    return CacheFacts.of(open_dataset(folder).manifest, str(folder))


def changed(folder: Path, **options: object) -> DatasetManifest:
    manifest = open_dataset(folder).manifest
    return manifest.model_copy(update={"options": manifest.options | options})


def test_the_facts_of_a_cache(cache: Path, tmp_path: Path) -> None:
    facts = facts_of(cache)
    assert (facts.fingerprint, facts.num_frames, facts.channels, facts.text_width) == ("test", 5, 8, 16)
    assert facts.statistics["clips"]["num_clips"] == 2
    assert facts_of(write_cache(tmp_path, videos=1, text_width=None)).text_width is None


def test_a_manifest_that_does_not_say_what_the_latents_are_is_refused(cache: Path) -> None:
    for options in ({"num_frames": None}, {"text": 3}, {"statistics": None}):
        with pytest.raises(DataError, match="does not say what the latents are"):
            CacheFacts.of(changed(cache, **options), "there")


def test_videos_are_not_taken_for_latents(cache: Path) -> None:
    videos = open_dataset(cache).manifest.model_copy(update={"kind": "build"})
    with pytest.raises(DataError, match=r"there holds videos, not latents .*regen preencode"):
        CacheFacts.of(videos, "there")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((15, 32, 48), "content latents 2x8x4x6, the index and the manifest say 3x8x4x6"),
        ((10, 32, 40), "say 2x8x4x5"),
        ((1, 32, 48), "say 1x8x4x6"),
    ],
)
def test_an_entry_is_held_to_its_row(cache: Path, row: tuple[int, int, int], message: str) -> None:
    facts_of(cache).check(unpack_latents(packed(2)), 10, 32, 48)
    with pytest.raises(DataError, match=message):
        facts_of(cache).check(unpack_latents(packed(2)), *row)


def test_an_image_and_a_text_are_held_to_it_too(cache: Path) -> None:
    facts = facts_of(cache)
    facts.check(unpack_latents(packed(0)), 1, 32, 48)
    with pytest.raises(DataError, match="motion latents of 0 clips, the index says 5 frames"):
        facts.check(unpack_latents(packed(0)), 5, 32, 48)
    with pytest.raises(DataError, match="text embeddings of width None, the manifest says 16"):
        facts.check(unpack_latents(packed(2, None)), 10, 32, 48)


def test_the_empty_caption(cache: Path, tmp_path: Path) -> None:
    facts = facts_of(cache)
    null = read_null_text(Store(cache), facts)
    assert null is not None
    assert null.text.shape == (1, 16)
    assert (null.text.dtype, null.mask.dtype) == (torch.float32, torch.bool)
    assert null.mask.all()
    with pytest.raises(DataError, match=NULL_TEXT):
        read_null_text(Store(tmp_path), facts)
    Store(tmp_path).put(NULL_TEXT, pack_null_text(normal(2, 8)))
    with pytest.raises(DataError, match="width 8, the manifest says 16"):
        read_null_text(Store(tmp_path), facts)
    Store(tmp_path).put(NULL_TEXT, pack_null_text(normal(1, 16))[:-1])
    with pytest.raises(DataError, match=r"null.safetensors: not a safetensors file.*regen preencode"):
        read_null_text(Store(tmp_path), facts)
