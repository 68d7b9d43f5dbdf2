"""Datasets in the layouts of their authors and of other trainers, in small: each becomes a dataset of ours with its
captions, by the call behind the command that docs/recipes.md gives."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from regen_dist.data.build.build import assemble, build_shards, sequences_below
from regen_dist.data.build.lists import Columns
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.build.sources import find_sources
from regen_dist.errors import DataError
from tests.helpers.video import moving_square, write_video

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
