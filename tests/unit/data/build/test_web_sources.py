"""Videos and lists from web servers and from the hub, against a server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from regen_dist.data.build.build import build_shards
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.build.sources import find_sources
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, DataError, ObjectCut, ObjectMissing
from tests.helpers.video import moving_square, write_video
from tests.helpers.webserver import WebServer, serving

OPTIONS = BuildOptions(min_frames=4, min_motion=0, short_side=32)
QUICK = StoreLimits(stall_s=1, deadline_s=2)  # only where it is meant to be given up


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "www" / "clips").mkdir(parents=True)
    for seed, name in enumerate(("a b.mp4", "c.mp4")):
        write_video(tmp_path / "www" / "clips" / name, moving_square(12, seed=seed))
    with serving(tmp_path / "www") as server:
        yield server


def write_csv(server: WebServer, *videos: str) -> None:
    (server.folder / "list.csv").write_text("path,text\n" + "".join(f"{video},it moves\n" for video in videos))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("heads", [True, False])
def test_a_list_on_a_web_server_becomes_a_dataset(tmp_path: Path, server: WebServer, ranges: bool, heads: bool) -> None:
    from regen_dist.data.build.lists import Columns

    if not ranges and not heads:
        pytest.skip("a server that tells no size at all")
    server.ranges, server.heads = ranges, heads
    write_csv(server, "clips/a b.mp4", f"{server.url}/clips/a%20b.mp4", f"{server.url}/moved/clips/c.mp4")
    columns = Columns.parse("video=path,caption=text")
    found = find_sources([f"{server.url}/list.csv"], columns=columns)
    assert [one.caption for one in found.found] == ["it moves"] * 2
    built = build_shards([f"{server.url}/list.csv"], tmp_path / "out", OPTIONS, columns=columns, workers=0)
    assert built.manifest is not None
    assert built.manifest.totals.samples == 2
    assert [skip.reason for skip in built.manifest.skipped] == ["named twice: only the first is used"]


def test_dead_links_are_left_out_with_their_names_and_denied_ones_too(server: WebServer) -> None:
    server.refuse = {"private": 403}
    write_csv(server, f"{server.url}/clips/c.mp4", f"{server.url}/gone.mp4", f"{server.url}/private.mp4")
    (server.folder / "private.mp4").write_bytes(b"x")
    from regen_dist.data.build.lists import Columns

    found = find_sources([server.folder / "list.csv"], columns=Columns.parse("video=path"))
    assert len(found.found) == 1
    assert [skip.source.rpartition("/")[2] for skip in found.skipped] == ["gone.mp4", "private.mp4"]
    assert all(skip.reason.startswith("dead link: ") for skip in found.skipped)


def test_a_body_that_is_cut_once_goes_on_and_one_that_always_is_has_a_clear_error(
    tmp_path: Path, server: WebServer
) -> None:
    whole = (server.folder / "clips/c.mp4").read_bytes()
    server.cut, server.cuts = "c.mp4", 1
    Store(f"{server.url}/clips").download("c.mp4", tmp_path / "c.mp4")
    assert (tmp_path / "c.mp4").read_bytes() == whole
    server.cuts = -1
    server.ranges = False
    with pytest.raises(ObjectCut, match=r"c\.mp4: every try .* ended early"):
        Store(f"{server.url}/clips", QUICK).get("c.mp4")


def test_errors_say_what_the_server_said(server: WebServer) -> None:
    store = Store(f"{server.url}/clips")
    with pytest.raises(ObjectMissing, match="HTTP 404"):
        store.get("gone.mp4")
    with pytest.raises(DataError, match="redirects do not end"):
        Store(f"{server.url}/loop").get("x.mp4")
    with pytest.raises(DataError, match="a web server has no listing"):
        find_sources([f"{server.url}/clips"])
    with pytest.raises(DataError, match="read only"):
        store.put("x", b"")
    with pytest.raises(DataError, match="there is no such file"):
        find_sources([f"{server.url}/clips/gone.mp4"])
    with pytest.raises(DataError, match="a query"):
        Store(f"{server.url}/clips?sig=secret")
    assert [one.size for one in find_sources([f"{server.url}/clips/c.mp4"]).found] == [
        (server.folder / "clips/c.mp4").stat().st_size
    ]


def test_the_hub_is_listed_and_read_and_its_token_goes_to_nobody_else(
    tmp_path: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "metadata.jsonl").write_text(
        '{"file_name": "clips/c.mp4", "text": "a square"}\n{"file_name": "clips/a b.mp4", "text": "another"}\n'
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(server.folder) as elsewhere:
        server.elsewhere = elsewhere.port
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        built = build_shards(["hf://datasets/me/videos"], tmp_path / "out", OPTIONS, workers=0)
        found = find_sources(["hf://datasets/me/videos/clips"])
    assert built.manifest is not None
    assert built.manifest.totals.samples == 2
    assert [one.name for one in found.found] == ["a b.mp4", "c.mp4"]
    assert any(asked[3] == "Bearer hf_secret" for asked in server.seen)
    assert elsewhere.seen
    assert all(asked[3] is None for asked in elsewhere.seen)
    assert "hf_secret" not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_gated_repository_says_how_to_be_let_in(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.refuse = {"/datasets/me/videos": 401}
    with pytest.raises(AccessDenied, match="HF_TOKEN"):
        find_sources(["hf://datasets/me/videos/clips"])
    with pytest.raises(AccessDenied, match="HF_TOKEN"):
        Store("hf://datasets/me/videos/clips").get("c.mp4")
    with pytest.raises(DataError, match="hf://datasets/OWNER/NAME"):
        Store("hf://datasets/me")


def test_a_dataset_of_ours_is_read_where_it_lies_on_the_web(
    tmp_path: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("REGEN_CACHE", str(tmp_path / "cache"))
    build_shards([server.folder / "clips"], server.folder / "shards", OPTIONS, workers=0)
    for url in (f"{server.url}/shards", "hf://datasets/me/videos/shards"):
        dataset = open_dataset(url)
        row = dataset.row(0)
        assert row.frames == 12
        dataset.check(row, dataset.read(row))
