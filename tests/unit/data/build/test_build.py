from __future__ import annotations

import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import pytest
import webdataset

from regen_dist.data.build import build as shards
from regen_dist.data.build.build import Built, build_shards
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import checksum, sample_id
from regen_dist.data.format.manifest import MANIFEST, DatasetManifest
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import DataError
from tests.helpers.builds import OPTIONS, objects
from tests.helpers.video import moving_square, write_video


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
    with pytest.raises(DataError, match=r"part-00000-000001\.parquet: differs from the manifest"):
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


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)
