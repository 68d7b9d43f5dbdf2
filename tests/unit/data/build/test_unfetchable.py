"""Builds out of buckets of which some objects cannot be had: these are left out with the reason, the rest is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from regen_dist.data.build.build import build_shards
from regen_dist.data.build.foreign import index_tars
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from tests.helpers.fakestores import BUCKET, FakeStore, fake_store
from tests.helpers.objects import use
from tests.helpers.video import moving_square, write_video

URL = f"s3://{BUCKET}/v"
OPTIONS = BuildOptions(segment_seconds=1.5, short_side=48, crf=20, min_frames=20, samples_per_shard=1, scenes=False)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("made")
    frames = [moving_square(40 + 36 * number, 48, 64, seed=number) for number in range(3)]
    return [write_video(folder / f"{number}.mp4", each).read_bytes() for number, each in enumerate(frames)]


@pytest.fixture
def server(videos: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStore]:
    """Three good videos, one of them with a caption beside it."""
    with fake_store() as store:
        use(monkeypatch, store.environment())
        names = ("a.mp4", "m.mp4", "z.mp4")
        store.objects = {f"v/{name}": data for name, data in zip(names, videos, strict=True)}
        store.objects["v/a.txt"] = b"a square"
        yield store


def _sources(out: Path) -> set[str]:
    return {str(source) for source in open_dataset(out).table()["source"].to_pylist()}


def _left_out(out: Path) -> dict[str, str]:
    return {skip.source: skip.reason for skip in open_dataset(out).manifest.skipped if skip.segment is None}


@pytest.mark.parametrize("workers", [0, 1])
def test_each_source_that_cannot_be_fetched_is_left_out_with_the_reason(
    server: FakeStore, tmp_path: Path, workers: int
) -> None:
    server.objects |= {f"v/{name}": b"1" * size for size, name in enumerate(("b.mp4", "c.mp4", "d\\e.mp4", "f.mp4"), 1)}
    server.objects |= {"v//g.mp4": b"1", "v/h\n.mp4": b"1", "v//no video": b"1"}
    server.refused = {
        "v/b.mp4": (404, "NoSuchKey"), "v/c.mp4": (403, "InvalidObjectState"), "v/d\\e.mp4": (404, "NoSuchKey"),
        "v/f.mp4": (403, "AccessDenied"),
    }  # fmt: skip
    build_shards([URL], tmp_path / "out", OPTIONS, workers=workers)
    assert _sources(tmp_path / "out") == {"a.mp4", "m.mp4", "z.mp4"}
    reasons = _left_out(tmp_path / "out")
    expected = {
        "b.mp4": "not found", "c.mp4": "archived", "d\\e.mp4": "not found", "f.mp4": "access denied",
        "/g.mp4": "empty part", "h\n.mp4": "control character",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    assert all(words in reasons[name] for name, words in expected.items()), reasons


def test_sources_of_one_size_are_compared_though_one_cannot_be_fetched(
    server: FakeStore, videos: list[bytes], tmp_path: Path
) -> None:
    """Copies are found by reading all sources of a size."""
    server.objects |= {"v/b.mp4": videos[0], "v/c.mp4": videos[0]}
    server.refused = {"v/a.mp4": (403, "InvalidObjectState")}
    build_shards([URL], tmp_path / "out", replace(OPTIONS, part_gb=1e-6), workers=0)
    assert _sources(tmp_path / "out") == {"b.mp4", "m.mp4", "z.mp4"}
    assert {name: reason.split(":")[0] for name, reason in _left_out(tmp_path / "out").items()} == {
        "a.mp4": "unreadable", "c.mp4": "duplicate",
    }  # fmt: skip


def test_a_caption_that_cannot_be_fetched_leaves_its_video_out(server: FakeStore, tmp_path: Path) -> None:
    server.refused = {"v/a.txt": (403, "InvalidObjectState")}
    build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    assert "archived" in _left_out(tmp_path / "out")["a.mp4"]


def test_another_caption_of_the_same_length_is_refused(server: FakeStore, tmp_path: Path) -> None:
    """In a bucket by the object's tag, so that no text is fetched for it."""
    build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    server.objects["v/a.txt"] = b"a circle"
    with pytest.raises(DataError, match="digest"):
        build_shards([URL], tmp_path / "out", OPTIONS, workers=0)


@pytest.mark.parametrize("answer", [(403, "ExpiredToken"), (403, "InvalidAccessKeyId"), (404, "NoSuchBucket")])
def test_what_concerns_the_whole_store_stops_and_a_rerun_goes_on(
    server: FakeStore, tmp_path: Path, answer: tuple[int, str]
) -> None:
    """Nothing is left out for it: every next source would be, too."""
    server.refused = {"v/m.mp4": answer}
    with pytest.raises(DataError, match=r"access denied|no bucket"):
        build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    server.refused = {}
    build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    assert (_sources(tmp_path / "out"), _left_out(tmp_path / "out")) == ({"a.mp4", "m.mp4", "z.mp4"}, {})


def test_a_rerun_goes_on_though_a_source_can_no_longer_be_fetched(
    server: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was planned, and then archived: its segments that are not made yet are left out."""
    build_shards([URL], tmp_path / "whole", OPTIONS, workers=0)
    put, out = Store.put, tmp_path / "out"

    def die(store: Store, name: str, data: bytes) -> None:
        if name == "part-00000-000003.parquet":
            raise KeyboardInterrupt
        put(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", die)
        with pytest.raises(KeyboardInterrupt):
            build_shards([URL], out, OPTIONS, workers=0)
    server.refused = {"v/z.mp4": (403, "InvalidObjectState")}
    build_shards([URL], out, OPTIONS, workers=0)
    whole, found = open_dataset(tmp_path / "whole"), open_dataset(out)
    left_out = [skip for skip in found.manifest.skipped if skip.source == "z.mp4" and "archived" in skip.reason]
    assert left_out
    assert len(found) + len(left_out) == len(whole)


def test_a_build_of_nothing_but_refused_sources_says_why(server: FakeStore, tmp_path: Path) -> None:
    server.refused = dict.fromkeys(server.objects, (403, "AccessDenied"))
    with pytest.raises(DataError, match=r"(?s)no sample is left.*a\.mp4: unreadable: .*access denied"):
        build_shards([URL], tmp_path / "out", OPTIONS, workers=0)
    server.objects = {"v//b.mp4": b"1"}
    with pytest.raises(DataError, match=r"(?s)no videos .*left out:.*/b\.mp4: its key has an empty part"):
        build_shards([URL], tmp_path / "out", OPTIONS, workers=0)


def test_an_odd_tar_is_named(server: FakeStore, tmp_path: Path) -> None:
    server.objects = {"v//b.tar": b"1"}
    with pytest.raises(DataError, match=r"/b\.tar: its key has an empty part"):
        index_tars(URL, tmp_path / "out", workers=0)


@pytest.mark.parametrize("name", ["a#b.mp4", "a?b.mp4", "a?x=1.mp4", "50%25 of #1?/deep #2.mp4", "a b+c.mp4"])
def test_absolute_and_relative_names_in_lists_are_keys_as_they_stand(
    server: FakeStore, videos: list[bytes], tmp_path: Path, name: str
) -> None:
    server.objects[f"lists/{name}"] = videos[0]
    for number, video in enumerate((f"s3://{BUCKET}/lists/{name}", name)):
        server.objects["lists/all.csv"] = f'video,caption\n"{video}",a caption\n'.encode()
        out = tmp_path / str(number)
        build_shards([f"s3://{BUCKET}/lists/all.csv"], out, OPTIONS, workers=0)
        assert _sources(out) == {name}


def test_a_signed_url_in_a_list_is_refused_and_not_repeated(server: FakeStore, tmp_path: Path) -> None:
    server.objects["lists/all.csv"] = b"video\ns3://regen/v/a.mp4?X-Amz-Signature=hunter2\n"
    with pytest.raises(DataError, match=r"line 2: .*must not carry credentials") as refused:
        build_shards([f"s3://{BUCKET}/lists/all.csv"], tmp_path / "out", OPTIONS, workers=0)
    assert "hunter2" not in str(refused.value)


def test_a_video_with_an_odd_sign_can_be_named_alone(server: FakeStore, videos: list[bytes], tmp_path: Path) -> None:
    server.objects = {"v/a#b.mp4": videos[0]}
    build_shards([f"{URL}/a%23b.mp4"], tmp_path / "out", OPTIONS, workers=0)
    assert _sources(tmp_path / "out") == {"a#b.mp4"}
