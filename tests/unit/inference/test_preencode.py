"""Videos to a cache of latents: entries, captions, sums, resuming, sharing the work, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.build.foreign import index_tars
from regen_dist.data.format.catalogue import Dataset, open_dataset
from regen_dist.data.format.latents import CacheFacts, LatentEntry, read_null_text, unpack_latents
from regen_dist.data.storage.store import Store
from regen_dist.data.video.conversion import fit_geometry
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.errors import DataError
from regen_dist.inference import preencode as module
from regen_dist.inference import preencode as preencode_module
from regen_dist.inference import preencode_clips
from regen_dist.inference.codec import Codec
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.latent_space import read_statistics
from regen_dist.inference.preencode import Captions, Sums, preencode, read_sums
from regen_dist.models.encoder import Latents
from regen_dist.models.text import TextEncoder
from tests.helpers.checkpoints import saved_run
from tests.helpers.datasets import numbered, objects, write_tar
from tests.helpers.preencoding import FPS, StandInText, Video, preencode_config, write_videos

CPU = torch.device("cpu")
TEXT = {"encoder": "stand-in", "max_tokens": 8}
VIDEOS = [
    Video(13, caption="a red square"),  # two clips, and three frames that are left out
    Video(3, caption="a blue disk"),  # an image
    Video(5, 48, 32),
    Video(11, caption="a red square"),
    Video(7, 40, 56, "a green star"),  # cropped to 32 x 48
    Video(16, caption="a blue disk"),
    Video(1, 48, 32, "one frame"),
    Video(10, 48, 32, "a red disk"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos in three shards."""
    return write_videos(tmp_path_factory.mktemp("videos"), VIDEOS)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of clips of five frames."""
    return saved_run(tmp_path_factory.mktemp("runs")).folder


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> StandInText:
    """What a config's text encoder is."""
    made = StandInText()
    monkeypatch.setattr(TextEncoder, "load", lambda config, device: made)
    return made


@pytest.fixture(scope="module")
def whole(data: Path, embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache with text that one undisturbed task makes. Read it, do not change it."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "load", lambda config, device: StandInText())
        preencode(preencode_config(embedder, data, out, text=TEXT))
    return out


def _entries(cache: Dataset) -> list[LatentEntry]:
    return [unpack_latents(cache.read(cache.row(row))) for row in range(len(cache))]


def _encoded(codec: Codec, data: Path, row: int, size: tuple[int, int], *, step: int = 1) -> tuple[Tensor, Tensor]:
    """Content and motion of the clips of a video by the whole codec, one clip at a time, from its middle, in bf16."""
    dataset, video = open_dataset(data), VIDEOS[row]
    taken = range(0, video.frames, step)
    clips = len(taken) // 5
    with VideoReader(dataset.read(dataset.row(row))) as reader:
        frames = taken[: 5 * clips] if clips else taken[:1]
        pixels = read_clip(reader, frames, fit_geometry(video.height, video.width, size, None))
    parts = [torch.from_numpy(part)[None].float() / 127.5 - 1 for part in np.split(pixels, max(1, clips), axis=1)]
    content, motion = zip(*(codec.encode(part) for part in parts), strict=True)
    return torch.cat(content).bfloat16(), torch.cat(motion)[:clips].bfloat16()


@pytest.fixture(scope="module")
def codec(embedder: Path) -> Codec:
    """The whole of the embedder."""
    return Codec.load(embedder, device=CPU)


def test_entries_are_what_the_codec_encodes(data: Path, embedder: Path, codec: Codec, tmp_path: Path) -> None:
    """Clip by clip, from the first frame, without overlap; images and tails too. One clip at a time: bit for bit."""
    preencode(preencode_config(embedder, data, tmp_path / "out", batch_clips=1))
    for row, entry in enumerate(_entries(open_dataset(tmp_path / "out"))):
        size = (VIDEOS[row].height // 16 * 16, VIDEOS[row].width // 16 * 16)
        content, motion = _encoded(codec, data, row, size)
        assert torch.equal(entry.content, content)
        assert torch.equal(entry.motion, motion)


def test_in_batches_they_are_the_same_but_for_rounding(data: Path, codec: Codec, whole: Path) -> None:
    for row, entry in enumerate(_entries(open_dataset(whole))):
        size = (VIDEOS[row].height // 16 * 16, VIDEOS[row].width // 16 * 16)
        for stored, expected in zip(entry[:2], _encoded(codec, data, row, size), strict=True):
            torch.testing.assert_close(stored, expected, rtol=2**-7, atol=2**-10)


def test_the_index_describes_what_was_encoded(data: Path, whole: Path) -> None:
    """Keys, ids, order, captions and sources are the videos'; frames and sides those of the clips."""
    cache, dataset = open_dataset(whole), open_dataset(data)
    ours, theirs = cache.table(), dataset.table()
    for name in ("key", "id", "caption", "source"):
        assert ours[name].to_pylist() == theirs[name].to_pylist()
    assert ours["frames"].to_pylist() == [10, 1, 5, 10, 5, 15, 1, 10]
    sides = list(zip(ours["height"].to_pylist(), ours["width"].to_pylist(), strict=True))
    assert sides == [(32, 32), (32, 32), (48, 32), (32, 32), (32, 48), (32, 32), (48, 32), (48, 32)]
    entries = _entries(cache)
    assert [entry.metadata["frames_left_out"] for entry in entries] == ["3", "2", "0", "1", "2", "1", "0", "0"]
    facts = CacheFacts.of(cache.manifest, cache.store.url)
    for row, entry in enumerate(entries):
        found = cache.row(row)
        facts.check(entry, found.frames, found.height, found.width)


def test_keys_that_start_anew_in_every_shard_keep_their_ids(embedder: Path, tmp_path: Path) -> None:
    """In tars of others ids tell apart what keys do not: entries of one id would get the same noise."""
    for shard in range(2):
        write_tar(tmp_path / "tars" / f"{shard}.tar", numbered(2, seed=2 * shard))
    index_tars(tmp_path / "tars", workers=0)
    preencode(preencode_config(embedder, tmp_path / "tars", tmp_path / "out"))
    ids = open_dataset(tmp_path / "out").ids.tolist()
    assert ids == open_dataset(tmp_path / "tars").ids.tolist()
    assert len(set(ids)) == 4


def test_what_the_manifest_says(data: Path, embedder: Path, whole: Path) -> None:
    manifest = open_dataset(whole).manifest
    options = manifest.options
    assert manifest.kind == "latents"
    assert [entry.name for entry in manifest.shards] == [f"latents-00000{n}-000000.tar" for n in range(3)]
    assert (options["num_frames"], options["channels"], options["fps"], options["frames_left_out"]) == (5, 8, FPS, 9)
    assert options["encoder"]["fingerprint"] == FrozenEncoder.load(embedder, device=CPU).fingerprint
    assert (options["encoder"]["run"], options["encoder"]["step"]) == ("tiny", 7)
    pixels = 3 * (32 * 32 * (10 + 1 + 10 + 15) + 48 * 32 * (5 + 1 + 10) + 32 * 48 * 5)
    assert options["sizes"] == {"source_bytes": open_dataset(data).manifest.totals.bytes, "pixel_bytes": pixels}


def test_text(whole: Path, text: StandInText) -> None:
    """Each caption's embedding and mask; a video without one has the embedding of the empty caption."""
    cache = open_dataset(whole)
    for video, entry in zip(VIDEOS, _entries(cache), strict=True):
        expected = text.encode([video.caption])[0] if video.caption else text.null()
        assert entry.text is not None
        assert entry.mask is not None
        assert torch.equal(entry.text, expected.bfloat16())
        assert entry.mask.tolist() == [1] * len(expected)
    null = read_null_text(cache.store, CacheFacts.of(cache.manifest, cache.store.url))
    assert null is not None
    assert torch.equal(null.text, text.null().bfloat16().float())


def test_a_caption_is_embedded_once_in_a_shard(data: Path, embedder: Path, tmp_path: Path, text: StandInText) -> None:
    preencode(preencode_config(embedder, data, tmp_path / "out", text=TEXT))
    assert text.asked == ["a red square", "a blue disk", "a red square", "a green star", "a blue disk", *text.asked[5:]]
    assert text.asked[5:] == ["one frame", "a red disk"]


def test_statistics_are_those_of_the_stored_latents(whole: Path) -> None:
    """Clips apart from images, which are every entry's first content latent; also in a file beside the manifest."""
    entries = _entries(open_dataset(whole))
    found = read_statistics(whole / "statistics.json")
    assert found is not None
    assert json.loads(found.to_text()) == open_dataset(whole).manifest.options["statistics"]
    assert found.clips is not None
    assert found.images is not None
    assert (found.clips.num_clips, found.images.num_clips) == (11, 8)
    clips = [entry for entry in entries if entry.clips]
    for spread, latents in (
        (found.clips.content, torch.cat([entry.content.transpose(0, 1).flatten(1) for entry in clips], 1)),
        (found.clips.motion, torch.cat([entry.motion.transpose(0, 1).flatten(1) for entry in clips], 1)),
        (found.images.content, torch.cat([entry.content[0].flatten(1) for entry in entries], 1)),
    ):
        assert spread is not None
        torch.testing.assert_close(spread.mean, latents.double().mean(1))
        torch.testing.assert_close(spread.std, latents.double().std(1, correction=0))
    assert found.images.motion is None


def test_the_rate_of_a_cache_is_that_of_a_video(embedder: Path, tmp_path: Path) -> None:
    data = write_videos(tmp_path, [Video(5, fps=rate) for rate in (10, 24, 30, 30)])
    preencode(preencode_config(embedder, data, tmp_path / "out"))
    assert open_dataset(tmp_path / "out").manifest.options["fps"] == 24


def test_stride_and_most_clips(data: Path, embedder: Path, codec: Codec, tmp_path: Path) -> None:
    config = preencode_config(embedder, data, tmp_path / "out", stride=2, max_clips=1)
    preencode(config)
    cache = open_dataset(tmp_path / "out")
    entries = _entries(cache)
    # 13 frames become 7, 11 become 6, 16 become 8 and 10 become 5; the others are too short for a clip now.
    assert [entry.clips for entry in entries] == [1, 0, 0, 1, 0, 1, 0, 1]
    assert [int(entry.metadata["frames_left_out"]) for entry in entries] == [2, 1, 2, 1, 3, 3, 0, 0]
    assert cache.table()["fps"].to_pylist() == [FPS / 2] * 8
    assert cache.manifest.options["fps"] == FPS / 2
    for stored, expected in zip(entries[0][:2], _encoded(codec, data, 0, (32, 32), step=2), strict=True):
        torch.testing.assert_close(stored, expected, rtol=2**-7, atol=2**-10)
    preencode(preencode_config(embedder, data, tmp_path / "two", max_clips=2))
    assert max(entry.clips for entry in _entries(open_dataset(tmp_path / "two"))) == 2


def test_each_video_goes_to_the_bucket_that_fits_it_best(data: Path, embedder: Path, tmp_path: Path) -> None:
    preencode(preencode_config(embedder, data, tmp_path / "out", buckets=[[32, 32], [48, 32], [16, 32]]))
    entries = _entries(open_dataset(tmp_path / "out"))
    shapes = [tuple(8 * side for side in entry.content.shape[-2:]) for entry in entries]
    assert shapes == [(32, 32), (32, 32), (48, 32), (32, 32), (32, 32), (32, 32), (48, 32), (48, 32)]


@pytest.fixture(scope="module")
def in_four(data: Path, embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The same cache by four tasks, of which one has nothing to do."""
    out = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "load", lambda config, device: StandInText())
        config = preencode_config(embedder, data, out, text=TEXT)
        return out, [preencode(config, task=(task, 4)) for task in (3, 1, 0, 2)]


def test_four_tasks_make_what_one_makes(in_four: tuple[Path, list[Any]], whole: Path) -> None:
    """Every byte, the statistics in the manifest among them; the last to end writes it."""
    out, made = in_four
    assert [each.shards_missing for each in made] == [3, 2, 1, 0]
    assert [each.manifest is None for each in made] == [True, True, True, False]
    assert [each.shards_made for each in made] == [0, 1, 1, 1]
    assert objects(out) == objects(whole)


def test_a_second_run_does_nothing(data: Path, embedder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a shard was encoded again")

    monkeypatch.setattr(module, "encode_shard", refuse)
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    again = preencode(preencode_config(embedder, data, whole, text=TEXT))
    assert again.manifest == open_dataset(whole).manifest
    assert (again.shards_made, again.encoded) == (0, (0, 0, 0))
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize(
    "lost",
    [
        "latents-000001-000000.tar",
        "latents-000001-000000.parquet",
        "latents-000001.statistics.json",
        "null.safetensors",
    ],
)
def test_what_is_lost_is_made_again(
    data: Path, embedder: Path, in_four: tuple[Path, list[Any]], whole: Path, lost: str
) -> None:
    """That alone, with the same bytes."""
    out = in_four[0]
    (out / lost).unlink()
    again = preencode(preencode_config(embedder, data, out, text=TEXT))
    assert again.shards_made == (lost != "null.safetensors")
    assert objects(out) == objects(whole)


@pytest.mark.parametrize("others", ["latents-000001-000000.tar", "latents-000001-000000.parquet"])
def test_two_that_make_the_same_shard(
    data: Path, embedder: Path, in_four: tuple[Path, list[Any]], whole: Path, others: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A job that was requeued while it ran, on another kind of GPU: a tar and an index of other bytes, of the same
    size, lay beside each other. Where the bytes are the same nothing is wrong."""
    out = in_four[0]
    config = preencode_config(embedder, data, out, text=TEXT)
    put_new, theirs = Store.put_new, (out / others).read_bytes()

    def meanwhile(store: Store, name: str, data: bytes) -> bool:
        if name.endswith(".parquet"):
            (out / others).unlink(missing_ok=True)
            (out / others).write_bytes(theirs)
        return put_new(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_new", meanwhile)
        (out / "latents-000001.statistics.json").unlink()
        preencode(config)
        assert objects(out) == objects(whole)
        theirs = bytes([*theirs[:-1], theirs[-1] ^ 1])
        (out / "latents-000001.statistics.json").unlink()
        with pytest.raises(DataError, match=r"latents-000001-000000.*another process makes this shard, too; end one"):
            preencode(config)
    preencode(config)
    assert objects(out) == objects(whole)


@pytest.mark.parametrize("damaged", ["latents-000001-000000.parquet", "null.safetensors", "manifest.json"])
def test_what_is_damaged_is_made_again(
    data: Path, embedder: Path, in_four: tuple[Path, list[Any]], whole: Path, damaged: str
) -> None:
    """As the errors of all readers say: run the same again."""
    out = in_four[0]
    (out / damaged).write_bytes((out / damaged).read_bytes()[:50])
    preencode(preencode_config(embedder, data, out, text=TEXT))
    assert objects(out) == objects(whole)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stride": 2}, "preprocessing.stride: 1 there, 2 now"),
        ({"weights": "plain"}, "encoder.fingerprint: "),
        ({"text": None}, "text: "),
        ({"batch_clips": 3}, "preprocessing.batch_clips: 4 there, 3 now"),
    ],
)
def test_a_cache_of_another_fingerprint_is_refused(
    data: Path, embedder: Path, whole: Path, changes: dict[str, Any], named: str
) -> None:
    """The message says which part is another; nothing is mixed."""
    before = objects(whole)
    with pytest.raises(DataError, match="of another request") as refused:
        preencode(preencode_config(embedder, data, whole, **{"text": TEXT} | changes))
    assert named in str(refused.value)
    assert "another output" in str(refused.value)
    assert objects(whole) == before


def test_other_videos_text_encoders_and_code_are_refused(
    data: Path, embedder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = preencode_config(embedder, data, whole, text=TEXT)
    others = write_videos(tmp_path, [Video(6, caption="another")])
    with pytest.raises(DataError, match=r"source\.fingerprint: "):
        preencode(config.model_copy(update={"data": str(others)}))
    monkeypatch.setattr(preencode_clips, "ENCODING_VERSION", 2)
    with pytest.raises(DataError, match=r"code\.encoding_version: 1 there, 2 now"):
        preencode(config)
    monkeypatch.undo()
    monkeypatch.setattr(TextEncoder, "load", lambda config, device: StandInText("another"))
    with pytest.raises(DataError, match=r"text\.fingerprint: stand-in there, another now"):
        preencode(config)


def test_the_fingerprint_is_not_of_the_videos(embedder: Path, whole: Path, tmp_path: Path) -> None:
    """So that caches that were made alike can be mixed; any other part changes it."""
    others = write_videos(tmp_path, [Video(6, caption="another")])
    found = [open_dataset(whole).manifest.options["fingerprint"]]
    for name, changes in (("same", {}), ("stride", {"stride": 2}), ("plain", {"weights": "plain"})):
        config = preencode_config(embedder, others, tmp_path / name, text=TEXT, **changes)
        made = preencode(config).manifest
        assert made is not None
        found.append(made.options["fingerprint"])
    assert found[1] == found[0]
    assert len(set(found)) == 3


def test_videos_that_cannot_be_encoded_are_left_out(embedder: Path, tmp_path: Path) -> None:
    """Each with its reason, in the manifest; the others are as if it had not been there."""
    videos = [Video(6), Video(9, damaged=True), Video(6, 8, 32), Video(10), Video(6, said=7)]
    made = preencode(preencode_config(embedder, write_videos(tmp_path, videos), tmp_path / "out"))
    assert made.manifest is not None
    assert {skip.source: skip.reason.split(":")[0] for skip in made.manifest.skipped} == {
        "video-1": "it cannot be opened",
        "video-2": "8x32 is too small",
        "video-4": "it has 6 frames, the index says 7; build its shard again",
    }
    assert open_dataset(tmp_path / "out").table()["key"].to_pylist() == ["video-0", "video-3"]
    assert made.encoded == (3, 0, 0)


def test_too_many_bad_videos_stop_it(embedder: Path, tmp_path: Path) -> None:
    """And nothing of their shard is there."""
    data = write_videos(tmp_path, [Video(6), *[Video(6, damaged=True)] * 20], samples_per_shard=21)
    config = preencode_config(embedder, data, tmp_path / "out")
    with pytest.raises(DataError, match=r"20 of 21 videos in part-000000\.tar cannot be encoded"):
        preencode(config)
    assert list(Store(tmp_path / "out").list()) == ["plan.json"]
    made = preencode(config, max_bad_share=1.0).manifest
    assert made is not None
    assert len(made.skipped) == 20


def test_captions_are_needed_for_text_alone(embedder: Path, tmp_path: Path) -> None:
    data = write_videos(tmp_path, [Video(6), Video(6)])
    with pytest.raises(DataError, match="set text=null"):
        preencode(preencode_config(embedder, data, tmp_path / "out", text=TEXT))
    made = preencode(preencode_config(embedder, data, tmp_path / "out")).manifest
    assert made is not None
    assert (made.options["text"], made.options["null_text"]) == (None, None)
    assert all(entry.text is None for entry in _entries(open_dataset(tmp_path / "out")))


def test_a_cache_is_not_encoded_again(embedder: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds latents"):
        preencode(preencode_config(embedder, whole, tmp_path / "out"))


def test_a_folder_of_something_else_is_left_alone(data: Path, embedder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        DataError, match=r"no command of `regen preencode` made \(thesis\.txt\); choose an empty output"
    ):
        preencode(preencode_config(embedder, data, tmp_path))


def test_progress_and_counts(data: Path, embedder: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    config: PreencodeConfig = preencode_config(embedder, data, tmp_path / "out")
    made = preencode(config, progress=lambda *each: told.append(each))
    assert made.encoded == (11, 2, 0)
    assert told[-1] == ("encode", 13, 13)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert made.clips_per_s == pytest.approx(13 / made.seconds)
    with pytest.raises(DataError, match="--task 4/4: must be one of 0/4 to 3/4"):
        preencode(config, task=(4, 4))


# Embeddings of a shard's captions, each once while it is held.


def test_embeddings_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preencode_module, "_TOGETHER", 2)
    monkeypatch.setattr(preencode_module, "_MAX_EMBEDDINGS", 3)
    asked = ["a", "b", "a", "", None, "c", "d", "e", "a"]
    encoder: Any = StandInText()
    held = Captions(encoder, asked, encoder.null().bfloat16())
    for caption in asked:
        expected = encoder.encode([caption])[0] if caption else encoder.null()
        encoder.asked.pop() if caption else None
        assert torch.equal(held.embedding(caption), expected.bfloat16())
        assert len(held._embeddings) <= 3
    assert encoder.asked == ["a", "b", "c", "d", "e", "a", "b"]


# What is counted over the entries of a cache.


def test_sums_survive_their_file() -> None:
    """Bit for bit, in whatever parts they are read back and added; damage is told."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        Sums.of(Latents(*torch.randn(2, n, 8, 4, 4, generator=generator).bfloat16()), left_out=n) for n in (1, 2, 3)
    ]
    parts.insert(1, Sums.of(Latents(torch.ones(1, 8, 4, 4), torch.ones(0, 8, 4, 4)), left_out=5))
    store = Store("unused")
    total, again = Sums(), Sums()
    for part in parts:
        total, again = total + part, again + read_sums(store, "latents-000000", part.to_bytes())
    assert again.to_bytes() == total.to_bytes()
    assert total.frames_left_out == 11
    assert total.clips is not None
    assert total.images is not None
    assert (total.clips.num_clips, total.images.num_clips) == (6, 4)
    assert Sums().to_bytes() == read_sums(store, "latents-000000", Sums().to_bytes()).to_bytes()
    with pytest.raises(DataError, match=r"latents-000000\.statistics\.json: damaged"):
        read_sums(store, "latents-000000", b"{}")


def test_sums_of_earlier_versions_are_read_and_of_later_ones_refused() -> None:
    """A cache that an earlier version began is finished: its sums are read, and written as they were."""
    data = (Path(__file__).parents[2] / "fixtures/004112b/latents/latents-000000.statistics.json").read_bytes()
    found = read_sums(Store("unused"), "latents-000000", data)
    assert found.frames_left_out == 16
    assert found.to_bytes() == data
    later = data.replace(b'"format": 1', b'"format": 2')
    with pytest.raises(DataError, match="it has format 2, this version reads 1"):
        read_sums(Store("unused"), "latents-000000", later)
