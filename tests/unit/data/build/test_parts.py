"""Builds of several parts: tasks, killed builds, duplicates; and what the filters do to real videos."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regen_dist.data.build import plan
from regen_dist.data.build.build import Built, build_shards
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import Sample, samples_of
from regen_dist.data.format.manifest import DatasetManifest
from regen_dist.errors import ConfigError, DataError
from tests.helpers.builds import OPTIONS, PARTS, objects
from tests.helpers.video import moving_square, write_video
from tools.shards.progress import parse_task


def manifest_of(built: Built) -> DatasetManifest:
    assert built.manifest is not None
    return built.manifest


def samples(folder: Path) -> list[Sample]:
    return samples_of(open_dataset(folder).table())


def reasons(manifest: DatasetManifest) -> dict[str, str]:
    return {skip.source: skip.reason.partition(":")[0] for skip in manifest.skipped}


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one undisturbed process makes of the sources in parts."""
    folder = tmp_path_factory.mktemp("whole")
    assert build_shards([sources], folder, PARTS, workers=0).parts == 3
    return objects(folder)


def test_parts_hold_the_sources_in_order(whole: dict[str, bytes]) -> None:
    assert sorted(name for name in whole if name.endswith(".tar")) == [
        *(f"part-00000-00000{shard}.tar" for shard in range(2)),
        *(f"part-00001-00000{shard}.tar" for shard in range(2)),
        *(f"part-00002-00000{shard}.tar" for shard in range(3)),
    ]
    manifest = DatasetManifest.model_validate_json(whole["manifest.json"])
    assert [entry.samples for entry in manifest.shards] == [2, 1, 2, 1, 2, 2, 1]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_tasks_one_after_the_other_make_the_same_dataset(
    sources: Path, tmp_path: Path, whole: dict[str, bytes], order: tuple[int, ...]
) -> None:
    for task in order[:-1]:
        built = build_shards([sources], tmp_path / "out", PARTS, task=(task, 3), workers=0)
        assert built.manifest is None
        assert built.shards_made in (2, 3)
    assert built.parts_missing == 1
    assert build_shards([sources], tmp_path / "out", PARTS, task=(order[-1], 3), workers=0).manifest
    assert objects(tmp_path / "out") == whole


def test_what_is_known_of_sources_is_not_looked_for_again(
    sources: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_shards([sources], out, PARTS, workers=0)
    for name in ("part-00001.json", "part-00001-000001.parquet", "manifest.json"):
        (out / name).unlink()
    monkeypatch.setattr(plan, "survey_source", None)
    assert build_shards([sources], out, PARTS, workers=0).shards_made == 1
    assert objects(out) == whole


def test_a_source_that_changes_under_a_build_is_noticed(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources, tmp_path / "in")
    build_shards([tmp_path / "in"], tmp_path / "out", PARTS, workers=0)
    for name in ("part-00001.json", "part-00001-000001.parquet", "manifest.json"):
        (tmp_path / "out" / name).unlink()
    path = tmp_path / "in" / "tall.mp4"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"tall\.mp4: has changed since this build began"):
        build_shards([tmp_path / "in"], tmp_path / "out", PARTS, workers=0)


def test_duplicates_are_found_over_parts_and_tasks(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(sources, folder)
    for name in ("wide again.mp4", "zz/wide.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "wide.mp4", folder / name)
    data = bytearray((folder / "wide.mp4").read_bytes())
    data[-1] ^= 1
    (folder / "a wide.mp4").write_bytes(data)  # same size, another content
    whole = build_shards([folder], tmp_path / "one", PARTS, workers=0)
    left_out = {skip.source: skip.reason for skip in manifest_of(whole).skipped}
    assert left_out == {
        "wide.mp4": "duplicate: same content as wide again.mp4",
        "zz/wide.mp4": "duplicate: same content as wide again.mp4",
    }
    for task in (3, 1, 0, 2):
        build_shards([folder], tmp_path / "four", PARTS, task=(task, 4), workers=0)
    assert objects(tmp_path / "four") == objects(tmp_path / "one")


def test_shots_are_cut_where_the_film_cuts(tmp_path: Path) -> None:
    film = np.concatenate([moving_square(50, seed=1), 255 - moving_square(70, seed=5), moving_square(30, seed=1)])
    write_video(tmp_path / "film.mp4", film)
    manifest = manifest_of(build_shards([tmp_path / "film.mp4"], tmp_path / "out", OPTIONS, workers=0))
    made = [(sample.key[-17:], sample.frames) for sample in samples(tmp_path / "out")]
    assert made == [
        ("00000000-00000036", 36),
        ("00000050-00000086", 36),
        ("00000086-00000120", 34),
        ("00000120-00000150", 30),
    ]
    assert [(skip.segment, skip.reason) for skip in manifest.skipped] == [
        (1, "too short: 14 frames, below --min-frames 20")
    ]
    assert all(sample.motion is not None and 0.2 < sample.motion < 20 for sample in samples(tmp_path / "out"))
    build_shards([tmp_path / "film.mp4"], tmp_path / "uncut", replace(OPTIONS, scenes=False), workers=0)
    uncut = samples(tmp_path / "uncut")
    assert [(sample.frames, sample.motion) for sample in uncut] == [(36, None)] * 4


def test_filters_leave_out_with_their_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_video(folder / "good.mp4", moving_square(36))
    write_video(folder / "still.mp4", np.repeat(moving_square(1), 36, axis=0))
    write_video(folder / "small.mp4", moving_square(36, 32, 48))
    write_video(folder / "narrow.mp4", moving_square(36, 64, 256))
    write_video(folder / "short.mp4", moving_square(12))
    flash = moving_square(36, seed=2)
    flash[5:8] = 255 - flash[5:8]
    write_video(folder / "flash.mp4", flash)
    options = replace(OPTIONS, min_side=48, max_aspect=3.0)
    manifest = manifest_of(build_shards([folder], tmp_path / "out", options, workers=0))
    assert reasons(manifest) == {
        "still.mp4": "frozen",
        "small.mp4": "too small",
        "narrow.mp4": "too narrow",
        "short.mp4": "too short",
        "flash.mp4": "cut inside",
    }
    assert [sample.source for sample in samples(tmp_path / "out")] == ["good.mp4"]


def test_damage_in_the_middle_costs_what_is_damaged(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", moving_square(240, seed=3), crf=4, keyframe_interval=24)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    manifest = manifest_of(build_shards([path], tmp_path / "out", OPTIONS, workers=0))
    made = [tuple(map(int, sample.key.rsplit("-", 2)[1:])) for sample in samples(tmp_path / "out")]
    assert sum(stop - start for start, stop in made) > 120
    assert any(skip.reason.startswith("damaged: ") for skip in manifest.skipped), manifest.skipped
    assert made[-1][1] == 240 or manifest.skipped[-1].reason.startswith("too short")


def test_captions_of_lists_and_of_texts_reach_index_and_tar(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(sources, folder)
    (folder / "tall.txt").write_text(" from the text\n")
    (folder / "wide.txt").write_bytes(b"\xff\xfe")
    (folder / "captions.csv").write_text('video,caption\nshort one.mkv,"a square, moving"\n')
    manifest = manifest_of(
        build_shards([folder], tmp_path / "out", OPTIONS, captions=folder / "captions.csv", workers=0)
    )
    captions = {sample.source: sample.caption for sample in samples(tmp_path / "out")}
    assert captions == {"more/short one.mkv": "a square, moving", "tall.mp4": "from the text"}
    assert [(skip.source, skip.reason) for skip in manifest.skipped] == [
        ("wide.mp4", "unreadable: its caption wide.txt is not UTF-8")
    ]
    with tarfile.open(tmp_path / "out" / "part-00000-000000.tar") as tar:
        assert sum(name.endswith(".txt") for name in tar.getnames()) == 4
    (folder / "list.jsonl").write_text(json.dumps({"video": "tall.mp4", "caption": "from the list"}) + "\n")
    build_shards([folder / "list.jsonl"], tmp_path / "listed", OPTIONS, workers=0)
    assert {sample.caption for sample in samples(tmp_path / "listed")} == {"from the list"}


def test_a_source_list_that_is_wholly_wrong_stops_the_build(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copyfile(sources / "wide.mp4", folder / "wide.mp4")
    for number in range(30):
        (folder / f"{number:02d}.mp4").write_bytes(b"no video" * (number + 1))
    with pytest.raises(DataError, match=r"(?s)30 of 31 sources in part-00000 cannot be read.*00\.mp4: unreadable"):
        build_shards([folder], tmp_path / "out", OPTIONS, workers=0)
    built = build_shards([folder], tmp_path / "out", OPTIONS, workers=0, max_bad_share=1.0)
    assert len(manifest_of(built).skipped) == 30


@pytest.mark.parametrize(
    ("text", "task"),
    [("0/1", (0, 1)), ("7/8", (7, 8)), ("slurm", (2, 4))],
)
def test_tasks_are_numbered_from_nought_or_by_slurm(text: str, task: tuple[int, int]) -> None:
    environ = {"ID": "8", "MIN": "4", "MAX": "10", "STEP": "2", "COUNT": "4"}  # --array=4-10:2
    assert parse_task(text, {f"SLURM_ARRAY_TASK_{name}": value for name, value in environ.items()}) == task


@pytest.mark.parametrize("text", ["8/8", "1", "a/b", "-1/2", "0/0", "slurm"])
def test_what_is_no_task_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--task"):
        parse_task(text, {})
