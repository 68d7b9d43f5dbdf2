"""Lists of videos: the layouts of other datasets and trainers, and videos on web servers and the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from regen_dist.data.build.build import assemble, build_shards, sequences_below
from regen_dist.data.build.lists import Columns
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.build.sources import find_sources
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import check_bytes
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, DataError, ObjectCut, ObjectMissing, StoreUnavailable
from tests.helpers.video import moving_square, write_video
from tests.helpers.webserver import WebServer, serving

OPTIONS = BuildOptions(min_frames=4, min_motion=0, short_side=32)


def videos(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        write_video(folder / name, moving_square(12, seed=seed))
    return folder


def captions(found: object) -> dict[str, str | None]:
    return {one.name: one.caption for one in found.found}  # type: ignore[attr-defined]


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "json"])
def test_columns_may_have_other_names(tmp_path: Path, kind: str) -> None:
    videos(tmp_path, "a.mp4")
    rows: list[dict[str, object]] = [{"path": "a.mp4", "text": "one", "video": "wrong.mp4"}]
    place = tmp_path / f"list.{kind}"
    if kind == "csv":
        table(place, rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), place)
    else:
        place.write_text(json.dumps(rows if kind == "json" else rows[0]))
    found = find_sources([place], columns=Columns.parse("video=path,caption=text"))
    assert captions(found) == {"a.mp4": "one"}
    with pytest.raises(DataError, match="clip"):
        find_sources([place], columns=Columns.parse("video=clip"))


@pytest.mark.parametrize("end", ["", "\n", "\r\n\r\n"])
def test_the_last_caption_of_a_text_file_may_be_empty(tmp_path: Path, end: str) -> None:
    videos(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "videos.txt").write_bytes(f"a.mp4\r\nb.mp4{end}".encode())
    (tmp_path / "prompts.txt").write_bytes(f"one\r\n\r\n{end}".encode())
    assert captions(find_sources([tmp_path])) == {"a.mp4": "one", "b.mp4": None}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_a_character_becomes_a_question_mark(tmp_path: Path, kind: str) -> None:
    """Captions that a program cut after so many UTF-16 units; the tar's text and JSON could not be written."""
    videos(tmp_path, "a.mp4")
    row = r'{"video": "a.mp4", "caption": "a cat \ud83d"}'
    (tmp_path / f"list.{kind}").write_text(row if kind == "jsonl" else f"[{row}]")
    build_shards([tmp_path / f"list.{kind}"], tmp_path / "out", OPTIONS, workers=0)
    assert open_dataset(tmp_path / "out").sample(0).caption == "a cat ?"


def test_a_column_of_captions_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A slip in its name gave a dataset without captions."""
    videos(tmp_path, "a.mp4")
    place = table(tmp_path / "list.csv", [{"video": "a.mp4", "text": "one"}])
    with pytest.raises(DataError, match="no row has a txt; check the column or --columns"):
        find_sources([place], columns=Columns.parse("video=video,caption=txt"))


def test_spaces_after_the_commas_of_a_csv_mean_nothing(tmp_path: Path) -> None:
    videos(tmp_path, "a.mp4")
    (tmp_path / "list.csv").write_text('video, caption\na.mp4, "red, blue"\n')
    assert captions(find_sources([tmp_path / "list.csv"])) == {"a.mp4": "red, blue"}


def test_a_very_long_caption_of_a_csv_is_read(tmp_path: Path) -> None:
    videos(tmp_path, "a.mp4")
    place = table(tmp_path / "list.csv", [{"video": "a.mp4", "caption": "word " * 40_000}])
    assert captions(find_sources([place])) == {"a.mp4": ("word " * 40_000).strip()}


def test_a_value_that_is_no_text_is_shown_in_short(tmp_path: Path) -> None:
    """Videos may be in a table as bytes, captions as whole records."""
    videos(tmp_path, "a.mp4")
    pq.write_table(pa.table({"video": [{"path": "a.mp4", "bytes": bytes(1 << 20)}]}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"its video is \{.*, not a text") as caught:
        find_sources([tmp_path / "list.parquet"])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["path", "video", "video=", "clip=x", "video=a,video=b", ""])
def test_columns_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"video=COLUMN,caption=COLUMN"):
        Columns.parse(text)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.json"])
def test_folders_of_finetrainers_and_diffusion_pipe(tmp_path: Path, name: str) -> None:
    videos(tmp_path / "videos", "0.mp4", "1.mp4", "2.mp4")
    rows: list[dict[str, object]] = [{"file_name": f"videos/{n}.mp4", "caption": f"number {n}"} for n in (1, 0)]
    if name.endswith(".csv"):
        table(tmp_path / name, rows)
    elif name == "captions.json":
        (tmp_path / name).write_text(json.dumps({"videos/1.mp4": ["number 1", "again"], "videos/0.mp4": "number 0"}))
    else:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    found = find_sources([tmp_path])
    assert captions(found) == {"videos/1.mp4": "number 1", "videos/0.mp4": "number 0"}
    assert [(skip.source, skip.reason.partition(":")[0]) for skip in found.skipped] == [("videos/2.mp4", "not named")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_list_whose_captions_have_another_name_says_so(tmp_path: Path, kind: str) -> None:
    videos(tmp_path, "0.mp4")
    place = tmp_path / f"metadata.{kind}"
    row: dict[str, object] = {"file_name": "0.mp4", "description": "a dog"}
    write: dict[str, Callable[[dict[str, object]], object]] = {
        "csv": lambda row: table(place, [row]),
        "jsonl": lambda row: place.write_text(json.dumps(row)),
        "json": lambda row: place.write_text(json.dumps([row])),
        "parquet": lambda row: pq.write_table(pa.Table.from_pylist([row]), place),
    }
    write[kind](row)
    (skip,) = find_sources([tmp_path]).skipped
    assert skip.source == f"metadata.{kind}"
    assert skip.reason.startswith("no captions: none of its columns (description) is called caption or text or prompt")
    columns = Columns.parse("video=file_name,caption=description")
    assert captions(find_sources([tmp_path], columns=columns)) == {"0.mp4": "a dog"}
    write[kind]({"file_name": "0.mp4"})
    assert find_sources([tmp_path]).skipped == ()


@pytest.mark.parametrize(("listed", "said"), [("videos.txt", "prompts.txt"), ("video.txt", "captions.txt")])
def test_two_files_of_lines(tmp_path: Path, listed: str, said: str) -> None:
    videos(tmp_path / "videos", "0.mp4", "1.mp4")
    (tmp_path / listed).write_text("videos/1.mp4\r\nvideos/0.mp4\r\n")
    (tmp_path / said).write_text("one, with a comma\nnought\n")
    assert captions(find_sources([tmp_path])) == {"videos/1.mp4": "one, with a comma", "videos/0.mp4": "nought"}
    (tmp_path / said).write_text("one\n")
    with pytest.raises(DataError, match=r"has 2 lines and .* 1"):
        find_sources([tmp_path])


def test_openvid(tmp_path: Path) -> None:
    folder = videos(tmp_path / "video", "---_abc_0_0to120.mp4", "xyz_3_10to200.mp4")
    rows: list[dict[str, object]] = [
        {"video": f"{name}.mp4", "caption": f"of {name}", "aesthetic score": 5.1, "motion score": 2.0, "fps": 30.0}
        for name in ("---_abc_0_0to120", "xyz_3_10to200", "of_another_part")
    ]
    listed = table(tmp_path / "OpenVid-1M.csv", rows)
    built = build_shards([folder], tmp_path / "out", OPTIONS, captions=listed, workers=0)
    assert built.manifest is not None
    assert built.manifest.totals.samples == 2
    assert captions(find_sources([folder], listed))["xyz_3_10to200.mp4"] == "of xyz_3_10to200"


def test_koala(tmp_path: Path) -> None:
    folder = videos(tmp_path / "clips", "--0abc_12_0to150.mp4")
    rows: list[dict[str, object]] = [
        {
            "videoID": "--0abc_12_0to150",
            "url": "https://x/watch",
            "timestamp": "['0:00:01', '0:00:05']",
            "caption": "a dog",
        }
    ]
    listed = table(tmp_path / "Koala_36M_1.csv", rows)
    found = find_sources([folder], listed, Columns.parse("video=videoID,caption=caption"))
    assert captions(found) == {"--0abc_12_0to150.mp4": "a dog"}


def test_panda(tmp_path: Path) -> None:
    folder = videos(tmp_path / "panda" / "00000", "0000000_00000.mp4", "0000000_00001.mp4")
    for name in ("0000000_00000", "0000000_00001"):
        (folder / f"{name}.txt").write_text(f"caption of {name}")
        (folder / f"{name}.json").write_text(json.dumps({"url": "https://x", "clips": [["0:00:01", "0:00:02"]]}))
    built = build_shards([tmp_path / "panda"], tmp_path / "out", OPTIONS, workers=0)
    assert built.manifest is not None
    assert built.manifest.totals.samples == 2
    shard = next((tmp_path / "out").glob("*.parquet"))
    assert sorted(pq.read_table(shard)["caption"].to_pylist()) == [
        "caption of 0000000_00000",
        "caption of 0000000_00001",
    ]


def test_davis(tmp_path: Path) -> None:
    frames = moving_square(8, height=48, width=64)
    top = tmp_path / "DAVIS/JPEGImages/480p"
    for name in ("bear", "blackswan"):
        (top / name).mkdir(parents=True)
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(
                top / name / f"{number:05d}.png" if name == "bear" else top / name / f"{number:05d}.jpg"
            )
    assert [one.name for one in sequences_below(top)] == ["bear", "blackswan"]
    assert assemble(top / "bear", tmp_path / "bear.mkv", 24) == 8
    with av.open(str(tmp_path / "bear.mkv")) as container:
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert container.streams.video[0].average_rate == 24
    assert (read == frames).all()
    with pytest.raises(DataError, match="--fps"):
        assemble(top / "bear", tmp_path / "x.mkv")
    Image.fromarray(frames[0][:20]).save(top / "bear" / "00009.png")
    with pytest.raises(DataError, match="one size a folder"):
        assemble(top / "bear", tmp_path / "x.mkv", 24)
    assert not list(tmp_path.glob("*x.mkv*"))


def test_pictures_of_any_kind_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """f10 is behind f9, whatever the alphabet says; 16 bits do not become white."""
    folder, target = tmp_path / "sequence", tmp_path / "a.mkv"
    folder.mkdir()
    for number in range(1, 13):
        Image.fromarray(np.full((8, 8), number * 20 << 8, np.uint16)).save(folder / f"f{number}.png")
    assemble(folder, target, 24)
    with av.open(str(target)) as container:
        read = [int(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
    assert read == [20 * number for number in range(1, 13)]


def test_a_folder_whose_name_has_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg takes what stands before it for a protocol."""
    monkeypatch.chdir(tmp_path)
    for name in ("take", "12:30"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("take/0.png")
    assert assemble(Path("take"), Path("12:30/take.mkv"), 24) == 1
    assert [path.name for path in Path("12:30").iterdir()] == ["take.mkv"]


def test_mcl_jcv(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (5, 32 * 3 // 2, 48), np.uint8)
    source = tmp_path / "videoSRC01_48x32_30.yuv"
    source.write_bytes(raw.tobytes())
    assert sequences_below(tmp_path) == [source]
    assert assemble(source, tmp_path / "videoSRC01.mkv") == 5
    with av.open(str(tmp_path / "videoSRC01.mkv")) as container:
        assert container.streams.video[0].average_rate == 30
        read = np.stack([frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)])
    assert (read == raw).all()
    source.write_bytes(raw.tobytes()[:-1])
    with pytest.raises(DataError, match="no whole number"):
        assemble(source, tmp_path / "x.mkv")


# Videos and lists from web servers and from the hub, against a server on loopback.

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


@pytest.mark.parametrize(("ranges", "heads"), [(True, True), (True, False), (False, True)])
def test_a_list_on_a_web_server_becomes_a_dataset(tmp_path: Path, server: WebServer, ranges: bool, heads: bool) -> None:
    from regen_dist.data.build.lists import Columns

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

    found = find_sources([server.folder / "list.csv"], columns=Columns.parse("video=path,caption=text"))
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


def test_a_server_without_ranges_is_named(server: WebServer) -> None:
    """Samples of a dataset are read by ranges; the file was said to be cut."""
    server.ranges = False
    with pytest.raises(DataError, match=r"c\.mp4: the server sends no ranges of bytes") as caught:
        Store(f"{server.url}/clips", QUICK).get_range("c.mp4", 10, 20)
    assert not isinstance(caught.value, ObjectCut)


def test_a_server_without_ranges_sends_a_file_once(server: WebServer) -> None:
    """It sent the whole file for each piece of it."""
    server.ranges, store = False, Store(f"{server.url}/clips")
    whole = (server.folder / "clips/c.mp4").read_bytes()
    for _ in range(2):
        assert b"".join(store.stream("c.mp4", len(whole) // 7)) == whole
    sent = [asked for method, _, asked, _ in server.seen if method == "GET" and asked is None]
    assert len(sent) == 2


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


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client's errors of connections are no OSErrors."""

    def refuse(*_: object, **__: object) -> None:
        raise HfHubHTTPError.__bases__[0]("[Errno 111] Connection refused")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", refuse)
    with pytest.raises(StoreUnavailable, match=r"hf://datasets/me/videos: no usable answer.*check the address"):
        find_sources(["hf://datasets/me/videos"])


@pytest.mark.parametrize(
    ("url", "says"), [("hf://datasets/me/my videos", "not the name of a repository"), ("hf://me/v", "than a listing")]
)
def test_listings_that_the_hub_does_not_give(
    server: WebServer, monkeypatch: pytest.MonkeyPatch, url: str, says: str
) -> None:
    (page := server.folder / "api/models/me/v/tree/main").parent.mkdir(parents=True)
    page.write_text("<html>log in to this network</html>")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(DataError, match=says):
        find_sources([url])


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
        check_bytes(row, dataset.read(row), url)
