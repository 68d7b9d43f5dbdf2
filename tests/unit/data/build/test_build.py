"""Builds of datasets: content, options, filters, duplicates, tasks, and builds that are killed and continued."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset

from regen_dist.data.build import build as shards
from regen_dist.data.build import plan
from regen_dist.data.build.build import Built, build_shards
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import Sample, checksum, sample_id, samples_of
from regen_dist.data.format.manifest import MANIFEST, DatasetManifest
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import ConfigError, DataError
from tests.helpers.datasets import OPTIONS, PARTS, flip_byte, objects
from tests.helpers.video import moving_square, write_video
from tools.shards.progress import parse_task


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def manifest_of(built: Built) -> DatasetManifest:
    assert built.manifest is not None
    return built.manifest


def test_the_index_describes_every_sample(dataset_folder: Path) -> None:
    dataset = open_dataset(dataset_folder)
    samples = [dataset.sample(row) for row in range(len(dataset))]
    assert len(samples) == 11
    assert [entry.samples for entry in dataset.manifest.shards] == [4, 4, 3]
    assert sorted(sample.frames for sample in samples) == [24] + [36] * 10
    for sample in samples:
        assert sample.id == sample_id(sample.key) == dataset.ids[samples.index(sample)]
        with VideoReader(dataset.read(sample)) as reader:
            info = reader.info()
        assert (info.frames, info.height, info.width, info.fps) == (sample.frames, sample.height, sample.width, 24.0)
        assert min(info.height, info.width) == 48
    assert {sample.source for sample in samples} == {"wide.mp4", "tall.mp4", "more/short one.mkv"}
    assert len({sample.id for sample in samples}) == 11
    totals = dataset.manifest.totals
    assert (totals.samples, totals.frames, totals.seconds) == (11, 384, 16.0)


def test_ranges_of_the_index_are_the_members_of_the_tar(dataset_folder: Path) -> None:
    dataset = open_dataset(dataset_folder)
    for row in range(len(dataset)):
        sample = dataset.sample(row)
        with tarfile.open(dataset_folder / sample.shard) as tar:
            file = tar.extractfile(sample.member)
            assert file is not None
            member = file.read()
        assert dataset.read(sample) == member
        assert checksum(member) == sample.checksum


def test_webdataset_reads_our_shards(dataset_folder: Path) -> None:
    dataset = open_dataset(dataset_folder)
    urls = [str(dataset_folder / entry.name) for entry in dataset.manifest.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [dataset.sample(row).key for row in range(len(dataset))]
    for row, sample in enumerate(read):
        assert sample["mp4"] == dataset.read(dataset.sample(row))
        assert json.loads(sample["json"])["frames"] == dataset.sample(row).frames


def test_building_again_does_nothing(dataset_folder: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(dataset_folder)
    monkeypatch.setattr(shards, "encode_segments", None)
    assert build_shards([sources], dataset_folder, OPTIONS, workers=0).shards_made == 0
    assert contents(dataset_folder) == before


@pytest.mark.parametrize(
    ("lost", "made"),
    [
        (["manifest.json"], 0),
        (["part-00000-000001.parquet", "manifest.json"], 2),
        (["part-00000-000002.tar"], 1),
        (["part-00000.json", "part-00000.plan.json"], 0),
        (["part-00000.json", "part-00000-000002.parquet", "part-00000-000000.tar"], 3),
    ],
)
def test_a_killed_build_is_finished_with_the_same_bytes(
    dataset_folder: Path, sources: Path, tmp_path: Path, lost: list[str], made: int
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset_folder, folder)
    for name in lost:
        (folder / name).unlink()
    (folder / ".part-00000-000001.tar.99.tmp").write_bytes(b"half")
    built = build_shards([sources], folder, OPTIONS, workers=0)
    assert built.shards_made == made
    assert {name: data for name, (data, _) in contents(folder).items()} == {
        name: data for name, (data, _) in contents(dataset_folder).items()
    }


def test_another_datasets_folder_is_not_touched(dataset_folder: Path, sources: Path) -> None:
    before = contents(dataset_folder)
    with pytest.raises(DataError, match=r"options\.crf: 20 there, 30 now"):
        build_shards([sources], dataset_folder, replace(OPTIONS, crf=30), workers=0)
    with pytest.raises(DataError, match=r"sources\.files: 3 there, 1 now"):
        build_shards([sources / "wide.mp4"], dataset_folder, OPTIONS, workers=0)
    assert contents(dataset_folder) == before


def test_foreign_files_are_not_touched(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"holds files that no command of `regen shards` made \(thesis\.txt\)"):
        build_shards([sources], tmp_path, OPTIONS, workers=0)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_what_is_left_out_is_listed_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    good = write_video(folder / "good.mp4", moving_square(36))
    write_video(folder / "tiny.mp4", moving_square(10))
    (folder / "copy of good.mp4").write_bytes(good.read_bytes())
    (folder / "broken.mp4").write_bytes(b"this is no video" * 50)
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:3000])
    (folder / "notes.txt").write_text("not looked at")
    manifest = manifest_of(build_shards([folder], tmp_path / "out", OPTIONS, workers=0))
    reasons = {skip.source: skip.reason for skip in manifest.skipped}
    assert sorted(reasons) == ["broken.mp4", "cut.mp4", "good.mp4", "tiny.mp4"]
    assert "cannot be opened" in reasons["broken.mp4"]
    assert reasons["good.mp4"] == "duplicate: same content as copy of good.mp4"
    assert reasons["tiny.mp4"] == "too short: 10 frames, below --min-frames 20"
    assert manifest.totals.samples == 1
    assert not [name for name, data in objects(tmp_path / "out").items() if str(tmp_path).encode() in data]


def test_equal_files_that_are_no_video_are_all_unreadable(tmp_path: Path) -> None:
    """Error pages that were saved as videos: of a hundred, one was unreadable, which --max-bad-share allows, and the
    others were duplicates of it."""
    folder = tmp_path / "sources"
    write_video(folder / "good.mp4", moving_square(36))
    for number in range(20):
        (folder / f"{number}.mp4").write_bytes(b"<html>404 Not Found</html>" * (number < 18))
    lax = manifest_of(build_shards([folder], tmp_path / "lax", OPTIONS, workers=0, max_bad_share=1.0))
    reasons = {skip.source: skip.reason for skip in lax.skipped}
    assert all(reasons[f"{number}.mp4"].startswith("unreadable: it cannot be opened") for number in range(18))
    assert {reasons["18.mp4"], reasons["19.mp4"]} == {
        "unreadable: it is empty (0 bytes); copy the file again, or leave it out"
    }
    with pytest.raises(DataError, match="20 of 21 sources in part-00000 cannot be read"):
        build_shards([folder], tmp_path / "strict", OPTIONS, workers=0)


def test_a_file_cut_behind_its_header_is_noticed(tmp_path: Path) -> None:
    plain, front = write_video(tmp_path / "plain.mp4", moving_square(120), crf=10), tmp_path / "in" / "front.mp4"
    front.parent.mkdir()
    with av.open(str(plain)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = front.read_bytes()
    front.write_bytes(data[: len(data) * 2 // 3])
    manifest = build_shards([front], tmp_path / "out", OPTIONS, workers=0).manifest
    assert 0 < manifest.totals.frames < 120  # what decodes is kept
    assert [note.note for note in manifest.notes] == ["damaged: the file is cut off before its end"]


def test_nothing_left_is_an_error_that_tells_why(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no videos"):
        build_shards([tmp_path / "in"], tmp_path / "out", workers=0)
    (tmp_path / "in" / "broken.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"(?s)no sample is left.*broken\.mp4: unreadable: it cannot be opened"):
        build_shards([tmp_path / "in"], tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="no such file or folder"):
        build_shards([tmp_path / "absent"], tmp_path / "other", workers=0)
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_keep_stores_the_files_as_they_are(sources: Path, tmp_path: Path) -> None:
    build_shards([sources / "wide.mp4"], tmp_path / "out", replace(OPTIONS, keep=True), workers=0)
    dataset = open_dataset(tmp_path / "out")
    assert len(dataset) == 1
    assert dataset.read(dataset.sample(0)) == (sources / "wide.mp4").read_bytes()


def test_start_and_max_seconds_bound_every_source(sources: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, start_seconds=1.0, max_seconds=3.0)
    build_shards([sources / "wide.mp4"], tmp_path / "out", options, workers=0)
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.sample(row).key[-17:] for row in range(2)] == ["00000024-00000060", "00000060-00000096"]
    assert len(dataset) == 2


def test_damaged_manifest_and_index_are_refused(dataset_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset_folder, folder)
    flip_byte(folder / "part-00000-000001.parquet", 100)
    message = r"part-00000-000001\.parquet: differs from the manifest.*regen shards verify .*which says what to remove"
    with pytest.raises(DataError, match=message):
        open_dataset(folder, cache=tmp_path / "cache")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(DataError, match="schema version 99, this program reads 2"):
        open_dataset(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        open_dataset(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match="no finished dataset"):
        open_dataset(folder)


@pytest.mark.parametrize("damaged", ["part-00000-000001.parquet", MANIFEST])
def test_what_is_cut_is_made_again(dataset_folder: Path, sources: Path, tmp_path: Path, damaged: str) -> None:
    """Run the build again, as the errors of all readers say."""
    folder = tmp_path / "copy"
    shutil.copytree(dataset_folder, folder)
    (folder / damaged).write_bytes((folder / damaged).read_bytes()[:50])
    build_shards([sources], folder, OPTIONS, workers=0)
    assert objects(folder) == objects(dataset_folder)


def test_the_fingerprint_follows_the_data_not_the_place(dataset_folder: Path, sources: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset_folder, tmp_path / "copy")
    assert open_dataset(tmp_path / "copy").fingerprint == open_dataset(dataset_folder).fingerprint
    other = manifest_of(build_shards([sources], tmp_path / "other", replace(OPTIONS, crf=30), workers=0))
    assert other.fingerprint != open_dataset(dataset_folder).fingerprint


def test_wrong_options_are_told_at_once() -> None:
    with pytest.raises(
        DataError, match=r"--samples-per-shard 0.*--short-side 8.*--crf 99.*--max-aspect 0.5.*--min-motion"
    ):
        BuildOptions(samples_per_shard=0, short_side=8, crf=99, max_aspect=0.5, min_motion=-1)


def test_the_manifest_holds_what_was_written(dataset_folder: Path) -> None:
    manifest = DatasetManifest.model_validate_json((dataset_folder / MANIFEST).read_text())
    for entry in manifest.shards:
        assert (dataset_folder / entry.name).stat().st_size == entry.size
        with tarfile.open(dataset_folder / entry.name) as tar:
            assert {member.mtime for member in tar} == {0}
    assert manifest.options["crf"] == 20
    assert str(dataset_folder.parent) not in (dataset_folder / MANIFEST).read_text()


# Builds of several parts: tasks, killed builds, duplicates; and what the filters do to real videos.


def samples(folder: Path) -> list[Sample]:
    return samples_of(open_dataset(folder).table())


def reasons(manifest: DatasetManifest) -> dict[str, str]:
    return {skip.source: skip.reason.partition(":")[0] for skip in manifest.skipped}


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Result of one undisturbed process, of the sources in parts."""
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


def test_tasks_one_after_the_other_make_the_same_dataset(
    sources: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for task in (2, 0):
        built = build_shards([sources], tmp_path / "out", PARTS, task=(task, 3), workers=0)
        assert built.manifest is None
        assert built.shards_made in (2, 3)
    assert built.parts_missing == 1
    assert build_shards([sources], tmp_path / "out", PARTS, task=(1, 3), workers=0).manifest
    assert objects(tmp_path / "out") == whole


def test_what_is_known_of_sources_is_not_looked_for_again(
    sources: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in whole.keys() - {"part-00001.json", "part-00001-000001.parquet", "manifest.json"}:
        (out / name).write_bytes(whole[name])
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


def test_a_caption_that_goes_with_a_duplicate_is_told(sources: Path, tmp_path: Path) -> None:
    """The same video under five names: with its caption again, with another, with another in a text, with none."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "again", "other", "text", "without"):
        shutil.copyfile(sources / "wide.mp4", folder / f"{name}.mp4")
    (folder / "text.txt").write_text("a mountain")
    (tmp_path / "c.csv").write_text("video,caption\na.mp4,a lake\nagain.mp4,a lake\nother.mp4,a hill\n")
    built = build_shards([folder], tmp_path / "out", OPTIONS, captions=tmp_path / "c.csv", workers=0)
    same, lost = "duplicate: same content as a.mp4", "; its own caption is left out"
    assert {skip.source: skip.reason for skip in manifest_of(built).skipped} == {
        "again.mp4": same,
        "other.mp4": same + lost,
        "text.mp4": same + lost,
        "without.mp4": same,
    }


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


def test_pauses_of_a_camera_do_not_shorten_its_segments(tmp_path: Path) -> None:
    """The rate is that of the frames; with the pauses in it, segments were a few frames long, and left out."""
    ticks = np.arange(144) * 42 + np.arange(144) // 48 * 600_000  # 2 s each ten minutes, in milliseconds
    write_video(tmp_path / "camera.mkv", moving_square(144, 64, 96), ticks=ticks.tolist())
    build_shards([tmp_path / "camera.mkv"], tmp_path / "out", OPTIONS, workers=0)
    assert [(sample.frames, round(sample.fps)) for sample in samples(tmp_path / "out")] == [(36, 24)] * 3


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
    (folder / "more" / "short one.txt").write_bytes(b"\xff\xfe")  # a list gives the caption: nobody needs it
    (folder / "captions.csv").write_text('video,caption\nshort one.mkv,"a square, moving"\n')
    manifest = manifest_of(
        build_shards([folder], tmp_path / "out", OPTIONS, captions=folder / "captions.csv", workers=0)
    )
    captions = {sample.source: sample.caption for sample in samples(tmp_path / "out")}
    assert captions == {"more/short one.mkv": "a square, moving", "tall.mp4": "from the text"}
    assert [(skip.source, skip.reason) for skip in manifest.skipped] == [
        ("wide.mp4", "unreadable: its caption wide.txt is not UTF-8; save it as UTF-8")
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


def test_an_array_with_gaps_is_refused_by_that_name() -> None:
    """Slurm tells the least number and how many there are of sbatch --array=0,2,5."""
    environ = {f"SLURM_ARRAY_TASK_{name}": value for name, value in {"ID": "5", "MIN": "0", "COUNT": "3"}.items()}
    with pytest.raises(ConfigError, match=r"array with gaps .*--array=0-2"):
        parse_task("slurm", environ)


@pytest.mark.parametrize("text", ["8/8", "1", "a/b", "-1/2", "0/0", "slurm"])
def test_what_is_no_task_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--task"):
        parse_task(text, {})
