"""The newest whole checkpoint is found; what is passed over is named; nothing is silently begun anew."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.errors import AccessDenied, NoGoodCheckpoint
from tests.unit.checkpoint.conftest import Write

SHARD = "rank-00000-of-00001.safetensors"


class Said(list[str]):
    """What the reader said."""

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
    """By sizes alone it is not: that is the bargain of `checkpoint.verify: sizes`."""
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
