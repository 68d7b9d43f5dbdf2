"""Checkpoint folders: a checkpoint is there as a whole or not at all, and the newest whole one is found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, CheckpointError, NoGoodCheckpoint
from tests.unit.checkpoint.conftest import Write

SHARD = "rank-00000-of-00001.safetensors"


def _inside(folder: CheckpointFolder, *names: str) -> Path:
    assert folder.store.folder is not None
    return folder.store.folder.joinpath(*names)


def test_what_was_committed_is_read(folder: CheckpointFolder) -> None:
    """Tensors, step, shapes; on disk as JSON and safetensors alone; the pointer names the newest."""
    manifest = folder.manifest(3)
    assert (folder.steps(), folder.pointer(), manifest.step) == ([1, 2, 3], 3, 3)
    assert torch.equal(folder.reader(manifest).whole("master/weight"), torch.full((2, 3), 3.0))
    assert folder.problems(manifest, checksums=True) == []
    assert {path.name for path in _inside(folder, "step-00000003").iterdir()} == {"manifest.json", SHARD}


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """A fresh run starts from scratch, without an error."""
    folder = CheckpointFolder(tmp_path / "none")
    assert (folder.steps(), folder.pointer(), folder.pins(), folder.debris()) == ([], None, set(), {})


def test_a_step_that_is_there_is_replaced(folder: CheckpointFolder, write: Write) -> None:
    """A step of an abandoned future is saved again; a pin stays."""
    folder.pin(3)
    before = _inside(folder, "step-00000003", SHARD).stat().st_ino
    write(3, state={"again": True})
    assert folder.manifest(3).state == {"again": True}
    assert _inside(folder, "step-00000003", SHARD).stat().st_ino != before
    assert folder.pins() == {3}


@pytest.mark.parametrize("debris", ["step-00000009.tmp", "step-00000009"])
def test_what_was_never_committed_is_debris(folder: CheckpointFolder, write: Write, debris: str) -> None:
    """It is no checkpoint, it is told, and the next save clears it."""
    shutil.copytree(_inside(folder, "step-00000003"), _inside(folder, debris))
    if not debris.endswith(".tmp"):
        _inside(folder, debris, "manifest.json").unlink()
    assert folder.steps() == [1, 2, 3]
    assert list(folder.debris()) == [debris]
    write(4)
    assert folder.debris() == {}
    assert not _inside(folder, debris).exists()
    assert folder.steps() == [1, 2, 3, 4]


def test_empty_folders_and_temporary_files_of_the_dead_are_cleared(folder: CheckpointFolder) -> None:
    """Leftovers of a process that dies before the first byte of a shard, or in the middle of the pointer."""
    _inside(folder, "step-00000009.tmp").mkdir()
    _inside(folder, ".latest.0.4194305.tmp").touch()  # no process has so high a number
    folder.clear_debris()
    assert {path.name for path in _inside(folder).iterdir()} == {
        *(f"step-{step:08d}" for step in (1, 2, 3)), "latest"
    }  # fmt: skip


def test_a_deletion_that_is_cut_off_leaves_debris(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest goes first: a checkpoint that lost files is never taken for one."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_: None)
        folder.remove(2)
    assert (folder.steps(), list(folder.debris())) == ([1, 3], ["step-00000002"])


def test_a_shard_that_rank_0_does_not_see(folder: CheckpointFolder) -> None:
    """Ranks that write to disks of their own: nothing is committed, and the reason is told."""
    manifest = folder.manifest(3)
    folder.begin(4)
    with pytest.raises(CheckpointError, match=r"1 of 1 shards are not in .* a folder that all ranks share"):
        folder.commit(manifest.with_files(manifest.files))
    assert folder.steps() == [1, 2, 3]


def test_a_listing_that_is_out_of_date(folder: CheckpointFolder, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS lists a folder as it was half a minute ago: shards that other nodes wrote are asked for by name."""
    own = Store.list
    monkeypatch.setattr(Store, "list", lambda store, prefix="": {} if ".tmp" in prefix else own(store, prefix))
    write(4)
    assert folder.steps() == [1, 2, 3, 4]


def test_amending_keeps_the_tensors(folder: CheckpointFolder) -> None:
    """The manifest says something else, in one atomic write; the files are the same."""
    before = _inside(folder, "step-00000002", SHARD).stat().st_ino
    folder.update_manifest(folder.manifest(2), state={"data_shift": 5}, rollbacks=[2])
    amended = folder.manifest(2)
    assert (amended.state, amended.rollbacks) == ({"data_shift": 5}, [2])
    assert folder.problems(amended, checksums=True) == []
    assert _inside(folder, "step-00000002", SHARD).stat().st_ino == before


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_problems_are_told_with_the_file(folder: CheckpointFolder) -> None:
    """Sizes always; bytes where checksums are asked for; a share of the files where ranks share the work."""
    manifest, shard = folder.manifest(3), _inside(folder, "step-00000003", SHARD)
    _flip(shard)
    assert folder.problems(manifest, checksums=False) == []
    assert folder.problems(manifest, checksums=True) == [f"{SHARD} does not have the SHA-256 in the manifest"]
    assert folder.problems(manifest, checksums=True, share=(1, 2)) == []
    os.truncate(shard, 5)
    size = manifest.files[SHARD]["bytes"]
    assert folder.problems(manifest, checksums=True) == [f"{SHARD} has 5 bytes, the manifest says {size} bytes"]
    shard.unlink()
    assert folder.problems(manifest, checksums=False) == [f"{SHARD} is missing, the manifest says {size} bytes"]


def test_a_checkpoint_that_was_moved_is_refused(folder: CheckpointFolder) -> None:
    """Its name and its manifest must agree on the step."""
    os.replace(_inside(folder, "step-00000002"), _inside(folder, "step-00000008"))
    with pytest.raises(CheckpointError, match="is of step 2; it was moved there"):
        folder.manifest(8)


@pytest.mark.parametrize("text", ["", "step-3", "step-00000003\nstep-00000002", "../step-00000003", "\xff\xfe"])
def test_a_damaged_pointer_is_named(folder: CheckpointFolder, text: str) -> None:
    """Never half believed."""
    _inside(folder, "latest").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="latest is damaged: it says"):
        folder.pointer()


def test_pins(folder: CheckpointFolder) -> None:
    """Only what is committed can be pinned."""
    folder.pin(1)
    assert folder.pins() == {1}
    folder.unpin(1)
    assert folder.pins() == set()
    with pytest.raises(CheckpointError, match=r"step-00000009 has no manifest\.json"):
        folder.pin(9)


# The newest whole checkpoint is found; what is passed over is named; nothing is silently begun anew.


class Said(list[str]):
    """Messages of the reader, in order."""

    def __call__(self, text: str) -> None:
        self.append(text)


def _newest(folder: CheckpointFolder, said: list[str] | None = None, **options: object) -> int | None:
    listener = Said()
    manifest = newest_good(folder, log=listener, **options)  # type: ignore[arg-type]
    if said is not None:
        said.extend(listener)
    return None if manifest is None else manifest.step


def _path(folder: CheckpointFolder, *names: str) -> Path:
    assert folder.store.folder is not None
    return folder.store.folder.joinpath(*names)


def test_the_pointer_decides(folder: CheckpointFolder) -> None:
    """Also when it was set back by hand."""
    assert _newest(folder) == 3
    folder.set_latest(2)
    assert _newest(folder) == 2


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    """The one case in which a run starts from scratch by itself. Debris does not count."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert _newest(folder) is None
    (tmp_path / "checkpoints" / "step-00000001.tmp").mkdir(parents=True)
    assert _newest(folder) is None


@pytest.mark.parametrize("pointer", [None, "nonsense"])
def test_without_a_usable_pointer_the_newest_is_taken(folder: CheckpointFolder, pointer: str | None) -> None:
    """A crash between the first commit and its pointer, or a damaged pointer, which is named."""
    said: list[str] = []
    _path(folder, "latest").unlink() if pointer is None else _path(folder, "latest").write_text(pointer)
    assert _newest(folder, said) == 3
    assert len(said) == (0 if pointer is None else 2)
    assert pointer is None or "latest is damaged: it says 'nonsense'" in said[0]


DAMAGES = {
    "no shard": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "cut shard": (lambda path: os.truncate(path / SHARD, 9), f"{SHARD} has 9 bytes"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    "cut manifest": (lambda path: os.truncate(path / "manifest.json", 30), "manifest.json is damaged"),
    "gone": (shutil.rmtree, "has no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_one_is_named_and_the_one_before_is_used(folder: CheckpointFolder, damage: str) -> None:
    """With the file and the reason."""
    inflict, reason = DAMAGES[damage]
    inflict(_path(folder, "step-00000003"))
    said: list[str] = []
    assert _newest(folder, said) == 2
    assert reason in said[0]
    assert "at step 2, the newest good checkpoint" in said[1]


def test_a_flipped_byte_is_found_by_checksums(folder: CheckpointFolder) -> None:
    """Sizes alone do not find it: that is the bargain of `checkpoint.verify: sizes`."""
    path = _path(folder, "step-00000003", SHARD)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert _newest(folder, checksums=False) == 3
    assert _newest(folder, checksums=True) == 2


def test_none_good_is_no_fresh_start(folder: CheckpointFolder) -> None:
    """Every reason is told, and how a fresh start is asked for."""
    for step in (1, 2, 3):
        _path(folder, f"step-{step:08d}", SHARD).unlink()
    with pytest.raises(NoGoodCheckpoint, match=r"step 3 .*step 2 .*step 1 .*--fresh") as caught:
        _newest(folder)
    assert caught.value.exit_code == 4


def test_a_store_that_denies_access_is_no_damage(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage must never make a run go on from an older checkpoint, or from scratch."""

    def deny(*_: object) -> None:
        raise AccessDenied("no")

    for method in ("get", "list"):
        with monkeypatch.context() as patch:
            patch.setattr(folder.store, method, deny)
            with pytest.raises(AccessDenied):
                _newest(folder)


def test_a_given_up_future_is_not_gone_on_from(folder: CheckpointFolder, write: Write) -> None:
    """After a rollback to step 2 the checkpoint of step 3 is no candidate, even when all that is newer is bad, or the
    pointer is lost."""
    folder.update_manifest(folder.manifest(2), rollbacks=[2])
    folder.set_latest(2)
    assert _newest(folder) == 2
    _path(folder, "latest").unlink()
    assert _newest(folder) == 2
    write(4, rollbacks=[2])
    _path(folder, "step-00000004", SHARD).unlink()
    assert _newest(folder) == 2
    _path(folder, "step-00000002", SHARD).unlink()
    assert _newest(folder) == 1


@pytest.mark.parametrize("pointed", [0, 7])
def test_a_pointer_to_what_is_not_there_hides_nothing(folder: CheckpointFolder, pointed: int) -> None:
    """One bit turns the 8 of a pointer into a 0: that is said, and the newest is found all the same."""
    folder.set_latest(pointed)
    said: list[str] = []
    assert _newest(folder, said) == 3
    assert f"step-{pointed:08d} has no manifest.json" in said[0]
