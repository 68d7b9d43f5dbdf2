"""Every byte of a tar is accounted for: what tarfile finds is found, and what is cut or damaged is told."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from regen_dist.data.build import tarscan
from regen_dist.data.build.tarscan import BLOCK, BrokenTar, Pieces, scan_members
from regen_dist.data.storage.store import Store
from tests.helpers.datasets import add_member, flip_byte, members

LONG = "folder/" * 30 + "ä" * 60 + ".mp4"


def scan(path: Path) -> dict[str, bytes]:
    """All members by our scan, their places checked against the file."""
    raw, found = path.read_bytes(), {}
    with Pieces(Store(path.parent), path.name) as pieces:
        for info, data in scan_members(pieces, lambda info: True):
            assert data == raw[info.offset_data : info.offset_data + info.size]
            found[info.name] = data
        assert pieces.sha256() == Store(path.parent).sha256(path.name)
        assert pieces.position == len(raw)
    return found


def some_tar(path: Path, *, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        add_member(tar, "a/one.mp4", b"x" * 1000)
        add_member(tar, "two.txt", b"")
        add_member(tar, "three.mp4", bytes(range(256)) * 2)
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("piece_bytes", [1, 700, 8 << 20])
def test_what_tarfile_finds_is_found(
    tmp_path: Path, form: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarscan, "PIECE_BYTES", piece_bytes)
    path = some_tar(tmp_path / "x.tar", form=form)
    found = scan(path)
    assert found == members(path)
    assert len(found) == 3


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_what_is_no_file(tmp_path: Path, form: int) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "for all"}) as tar:
        add_member(tar, LONG, b"long" * 300)
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("link/" * 40 + "x.mp4")
            info.type, info.linkname = kind, LONG
            tar.addfile(info)
        add_member(tar, "после.mp4", b"after")
    assert scan(path) == members(path) == {LONG: b"long" * 300, "после.mp4": b"after"}


@pytest.mark.parametrize("form", ["gnu", "posix", "v7", "ustar"])
def test_tars_of_the_tar_program(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.mp4").write_bytes(os.urandom(3000))
    with (folder / "holes.mp4").open("wb") as file:
        for block in range(40):  # more holes than the first header of a sparse file names
            file.seek(block * 65536)
            file.write(b"data")
    (folder / "z.mp4").write_bytes(b"behind the holes")
    path = tmp_path / "x.tar"
    sparse = ["--sparse"] if form in ("gnu", "posix") else []
    command = ["tar", f"--format={form}", *sparse, "--sort=name", "-cf", str(path), "-C", str(folder), "."]
    subprocess.run(command, check=True)
    # Bytes of a sparse file are not there as a range, so it is no member that could be read.
    expected = {name: data for name, data in members(path).items() if not (sparse and "holes" in name)}
    assert scan(path) == expected
    assert "./sub/a.mp4" in expected


def test_sizes_in_pax_records_and_large_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.mp4")
        info.size, info.pax_headers = 3, {"size": "700", "mtime": "1.5"}
        tar.addfile(info, io.BytesIO(b"abc"))
    data = bytearray(path.read_bytes())
    at = data.index(b"abc")
    path.write_bytes(data[:at] + b"y" * 700 + bytes(324) + bytes(1024))
    assert scan(path) == {"a.mp4": b"y" * 700}


def broken(path: Path) -> str:
    with pytest.raises(BrokenTar) as caught:
        scan(path)
    return str(caught.value)


def test_cuts_are_told_with_their_byte(tmp_path: Path) -> None:
    path = some_tar(tmp_path / "x.tar", form=tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    archive_end = 512 + 1024 + 512 + 512 + 512
    assert not any(whole[archive_end:])
    for size in range(0, len(whole), 100):
        path.write_bytes(whole[:size])
        if size >= archive_end + BLOCK:
            assert len(scan(path)) == 3
        else:
            assert f"it ends at byte {size}" in broken(path)
    boundaries = (0, 1536, 2048, archive_end)
    for size in boundaries:
        path.write_bytes(whole[:size])
        assert "cut between two members" in broken(path)
    path.write_bytes(whole[:700])
    assert "inside 'a/one.mp4', whose 1000 bytes begin at byte 512; copy the tar again" in broken(path)
    path.write_bytes(whole[:1600])
    assert "inside the header at byte 1536" in broken(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cuts_in_long_names(tmp_path: Path, form: int) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        add_member(tar, LONG, b"long" * 300)
    whole = path.read_bytes()
    for size in range(0, 3 * BLOCK, 256):
        path.write_bytes(whole[:size])
        assert f"it ends at byte {size}" in broken(path)


def test_every_byte_of_a_header_is_guarded(tmp_path: Path) -> None:
    path = some_tar(tmp_path / "x.tar", form=tarfile.USTAR_FORMAT)
    for position in range(1536, 2048, 37):
        flip_byte(path, position)
        assert "the header at byte 1536 is damaged" in broken(path)
        flip_byte(path, position)
    assert len(scan(path)) == 3


def test_damaged_pax_records(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add_member(tar, LONG, b"x")
    whole = path.read_bytes()
    for length in (b"000", b"999", b"0 1", b"abc"):
        path.write_bytes(whole[:BLOCK] + length + whole[BLOCK + 3 :])
        assert "the header at byte 0 is damaged (PAX records)" in broken(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = some_tar(tmp_path / "x.tar")
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "byte 0 begins a gzip stream" in broken(path)
    path.write_bytes(b"<html>no such object</html>" * 100)
    assert "the header at byte 0 is damaged" in broken(path)


def test_memory_does_not_grow_with_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarscan, "PIECE_BYTES", 1 << 20)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(8):
            add_member(tar, f"{number}.jpg", bytes(8 << 20))
    tracemalloc.start()
    with Pieces(Store(tmp_path), "x.tar") as pieces:
        assert len([info for info, data in scan_members(pieces, lambda info: False)]) == 8
        pieces.sha256()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20
