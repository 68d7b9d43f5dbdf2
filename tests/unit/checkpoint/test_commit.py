"""A checkpoint is there as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.checkpoint import commit
from regen_dist.checkpoint.commit import CheckpointStore
from regen_dist.errors import CheckpointError

SHAPES = {"weight": [2, 3]}
SHARD = "rank-00000-of-00001.safetensors"


def _save(store: CheckpointStore, step: int, keep: int = 9) -> None:
    pieces = {"master/weight": torch.full((6,), float(step))}
    store.save(step, pieces, SHAPES, {"num_updates": step}, "hash", keep)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        _save(store, step)
    return store


def test_the_newest_is_found_and_read(store: CheckpointStore) -> None:
    """What was saved comes back: tensors, counters, shapes, step; on disk as JSON and safetensors alone."""
    manifest = store.latest()
    assert manifest is not None
    assert (manifest.step, manifest.state, manifest.shapes) == (3, {"num_updates": 3}, SHAPES)
    assert (manifest.world_size, manifest.config_hash) == (1, "hash")
    assert torch.equal(store.reader(manifest).whole("master/weight"), torch.full((2, 3), 3.0))
    assert {path.name for path in (store.folder / "step-00000003").iterdir()} == {"manifest.json", SHARD}


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    """A fresh run starts from scratch, without an error."""
    assert CheckpointStore(tmp_path).latest() is None
    assert CheckpointStore(tmp_path).steps() == []


def test_retention(store: CheckpointStore) -> None:
    """The newest `keep` stay, and the pointer names one of them."""
    _save(store, 4, keep=2)
    assert store.steps() == [3, 4]
    manifest = store.latest()
    assert manifest is not None
    assert manifest.step == 4


def test_saving_a_step_twice_does_nothing(store: CheckpointStore) -> None:
    """A run that is stopped right after it resumed must not break on its own checkpoint, nor rewrite it."""
    before = (store.folder / "step-00000003" / SHARD).stat().st_ino
    _save(store, 3)
    assert (store.folder / "step-00000003" / SHARD).stat().st_ino == before


@pytest.mark.parametrize("die_at", ["shard", "manifest", "rename", "pointer", "prune"])
def test_dying_at_any_moment_leaves_a_loadable_run(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, die_at: str
) -> None:
    """Whenever a save is cut off, the run has a complete checkpoint: the one before, or once the pointer is moved the
    new one. Saving again clears the debris and succeeds."""

    class Death(BaseException):
        """Not an Exception: nothing may catch it."""

    def die(*_: Any) -> None:
        raise Death

    replace = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        if (die_at == "rename" and Path(target).name == "step-00000004") or (
            die_at == "pointer" and Path(target).name == "latest"
        ):
            raise Death
        replace(source, target)

    with monkeypatch.context() as patch:
        if die_at == "shard":
            patch.setattr(commit, "write_shard", die)
        elif die_at == "manifest":
            patch.setattr(commit, "write_text_atomically", die)
        elif die_at == "prune":
            patch.setattr(shutil, "rmtree", die)
        patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(Death):
            _save(store, 4, keep=2)
    manifest = store.latest()
    assert manifest is not None
    assert manifest.step == (4 if die_at == "prune" else 3)
    assert store.reader(manifest).whole("master/weight")[0, 0] == manifest.step
    _save(store, 4, keep=2)
    manifest = store.latest()
    assert manifest is not None
    assert manifest.step == 4, "the pointer moves, also when the step was committed before and the pointer was not"
    _save(store, 5, keep=2)
    assert store.steps() == [4, 5]
    assert {path.name for path in store.folder.iterdir()} == {"step-00000004", "step-00000005", "latest"}


def test_going_back_to_an_older_step(store: CheckpointStore) -> None:
    """Who writes an older step into the pointer trains on from there: later checkpoints of the abandoned future neither
    stand for the new ones, nor push them out."""
    _save(store, 4)
    (store.folder / "latest").write_text("step-00000001\n")
    stale = (store.folder / "step-00000002" / SHARD).stat().st_ino
    _save(store, 2, keep=2)
    assert (store.folder / "step-00000002" / SHARD).stat().st_ino != stale
    manifest = store.latest()
    assert manifest is not None
    assert manifest.step == 2
    _save(store, 3, keep=2)
    assert store.steps() == [2, 3, 4]
    manifest = store.latest()
    assert manifest is not None
    assert manifest.step == 3


def test_a_temporary_folder_is_no_checkpoint(store: CheckpointStore) -> None:
    """What was not committed is never read, and is cleared by the next save."""
    debris = store.folder / "step-00000009.tmp"
    shutil.copytree(store.folder / "step-00000003", debris)
    assert store.steps() == [1, 2, 3]
    manifest = store.latest()
    assert manifest is not None
    assert manifest.step == 3
    _save(store, 4)
    assert not debris.exists()


def test_a_shard_that_cannot_be_written_keeps_the_old_ones(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is a CheckpointError with its reason; pointer and older checkpoints are untouched."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commit, "write_shard", full)
    with pytest.raises(CheckpointError, match=r"step 4 was not saved: .*No space left"):
        _save(store, 4, keep=2)
    assert store.steps() == [1, 2, 3]
    manifest = store.latest()
    assert manifest is not None
    assert manifest.step == 3


def _cut(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "missing file": (lambda folder: (folder / SHARD).unlink(), rf"{SHARD} has None bytes, the manifest says"),
    "short file": (_cut, rf"{SHARD} has \d+ bytes, the manifest says"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest"),
    "cut manifest": (lambda folder: (folder / "manifest.json").write_text('{"schema": 1, "st'), "no readable manifest"),
    "other manifest": (lambda folder: (folder / "manifest.json").write_text("{}"), "no readable manifest"),
    "no folder": (shutil.rmtree, "no readable manifest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_with_the_name(store: CheckpointStore, damage: str) -> None:
    """The checkpoint that the pointer names is damaged: a CheckpointError that names it, and no silent fall-back."""
    inflict, message = DAMAGES[damage]
    inflict(store.folder / "step-00000003")
    with pytest.raises(CheckpointError, match=message) as caught:
        store.latest()
    assert "step-00000003" in str(caught.value)


def test_another_schema_is_refused(store: CheckpointStore) -> None:
    """A checkpoint of a later version says so."""
    path = store.folder / "step-00000003" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    with pytest.raises(CheckpointError, match="has schema 2, this version reads 1"):
        store.latest()


def test_a_missing_pointer_is_no_fresh_start(store: CheckpointStore) -> None:
    """Committed checkpoints without `latest`: an error that says what to do, never training from scratch."""
    (store.folder / "latest").unlink()
    with pytest.raises(CheckpointError, match="3 checkpoints but no pointer `latest`"):
        store.latest()
