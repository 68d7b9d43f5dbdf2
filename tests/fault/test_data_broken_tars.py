"""`regen shards index` on cut, damaged and compressed tars: each is named with the byte, the others are indexed."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path
from typing import Any

import pytest

from regen_dist.data.build.foreign import index_name, index_tars
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.manifest import MANIFEST
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.errors import DataError
from tests.helpers.foreign import change, write_shards


def cut_payload(tar: Path) -> int:
    with tarfile.open(tar) as opened:
        at = opened.getmember("000005.mp4").offset_data + 100
    tar.write_bytes(tar.read_bytes()[:at])
    return at


def cut_header(tar: Path) -> int:
    tar.write_bytes(tar.read_bytes()[:200])
    return 200


def cut_boundary(tar: Path) -> int:
    with tarfile.open(tar) as opened:
        at = opened.getmembers()[4].offset
    tar.write_bytes(tar.read_bytes()[:at])
    return at


def damage_header(tar: Path) -> int:
    with tarfile.open(tar) as opened:
        at = opened.getmembers()[3].offset
    change(tar, at + 3)
    return at


def compress(tar: Path) -> int:
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    return 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_payload, "it ends at byte {at}, inside '000005.mp4', whose"),
        (cut_header, "it ends at byte {at}, inside the header at byte 0; copy the tar again"),
        (cut_boundary, "it ends at byte {at} without the blocks of zeros that close a tar: cut between two members"),
        (damage_header, "the header at byte {at} is damaged (bad checksum); copy the tar again"),
        (compress, "byte 0 begins a gzip stream"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_tar_is_named_and_the_others_are_indexed(tmp_path: Path, damage: Any, says: str, workers: int) -> None:
    tars = write_shards(tmp_path)
    whole = tars[1].read_bytes()
    at = damage(tars[1])
    with pytest.raises(DataError) as caught:
        index_tars(tmp_path, workers=workers)
    assert caught.value.exit_code == 3
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("1 of 3 tars cannot be used; the others are indexed, there is no manifest yet.")
    assert lines[0].endswith("leave them out with --skip-broken:")
    assert len(lines) == 2
    assert lines[1].startswith(f"  00001.tar: {says.format(at=at)}")
    assert not (tmp_path / MANIFEST).exists()
    assert [index_name(tar.name) for tar in tars if (tmp_path / index_name(tar.name)).exists()] == [
        "00000.index.parquet",
        "00002.index.parquet",
    ]
    without = index_tars(tmp_path, workers=workers, skip_broken=True)
    assert without.shards_made == 0
    assert [skip.source for skip in without.broken] == ["00001.tar"]
    assert without.manifest.skipped == without.broken
    assert without.manifest.totals.samples == len(open_dataset(tmp_path)) == 8
    assert verify_dataset(tmp_path, workers=0).notes == ()
    tars[1].write_bytes(whole)
    mended = index_tars(tmp_path, workers=workers)
    assert (mended.shards_made, mended.broken, mended.manifest.totals.samples) == (1, (), 12)
