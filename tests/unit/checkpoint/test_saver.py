"""Saving in the background: one process here; ranks and deaths are in the suites dist and fault."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.saver import Outcome, Saver
from regen_dist.config.run import CheckpointConfig
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import StoreUnavailable

PHASES = ["clear", "shard", "vote", "manifest", "rename", "pointer", "prune"]


def _manifest(step: int) -> CheckpointManifest:
    return CheckpointManifest(
        step=step, samples=step, config_hash="", version="", topology={"world_size": 1}, state={}, metrics={},
        rollbacks=[], shapes={"weight": [6]},
    )  # fmt: skip


class Gate:
    """A phase hook that holds the writing thread at a phase until it is opened."""

    def __init__(self, held: str) -> None:
        self.held, self.open, self.phases = held, threading.Event(), list[str]()

    def __call__(self, phase: str) -> None:
        self.phases.append(phase)
        if phase == self.held:
            assert self.open.wait(30)


def _saver(run: Path, phase: Any = lambda name: None, **policy: Any) -> Saver:
    return Saver(CheckpointFolder(run), Ranks(), CheckpointConfig(**policy), phase)


def _settled(saver: Saver) -> Outcome:
    outcome = saver.settle()
    assert outcome is not None
    return outcome


def test_the_state_is_that_of_the_moment_of_saving(tmp_path: Path) -> None:
    """Training goes on while the thread writes: what changes then is not in the checkpoint."""
    gate, weight = Gate("clear"), torch.ones(6)
    saver = _saver(tmp_path, gate)
    assert saver.save(_manifest(1), {"master/weight": weight}) is None
    weight.zero_()
    assert not saver.finished
    time.sleep(0.1)
    gate.open.set()
    while not saver.finished:
        time.sleep(0.01)
    outcome = _settled(saver)
    assert (outcome.step, outcome.problem) == (1, "")
    assert outcome.blocked_s < outcome.seconds, "only the copy blocked"
    manifest = saver.folder.manifest(1)
    assert torch.equal(saver.folder.reader(manifest).whole("master/weight"), torch.ones(6))
    assert outcome.size_bytes == manifest.size_bytes > 24
    assert gate.phases == PHASES
    assert saver.settle() is None


def test_at_most_one_save_is_in_flight(tmp_path: Path) -> None:
    """The next one waits for the one before, and gives its outcome."""
    gate = Gate("shard")
    saver = _saver(tmp_path, gate)
    saver.save(_manifest(1), {"master/weight": torch.ones(6)})
    threading.Timer(0.5, gate.open.set).start()
    before = saver.save(_manifest(2), {"master/weight": torch.ones(6)})
    assert before is not None
    assert (before.step, before.problem) == (1, "")
    assert before.blocked_s > 0.1, "it was waited for"
    assert _settled(saver).step == 2
    assert saver.folder.steps() == [1, 2]
    assert gate.phases == [*PHASES, *PHASES]


def test_a_failure_is_an_outcome_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that cannot be written: the reason, with the rank; older checkpoints and the pointer stay; no debris; the
    next save succeeds."""
    saver = _saver(tmp_path)
    saver.save(_manifest(1), {"master/weight": torch.ones(6)})
    assert not _settled(saver).problem
    write = CheckpointFolder.write_shard

    def fail(self: CheckpointFolder, *arguments: Any) -> None:
        write(self, *arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "write_shard", fail)
        saver.save(_manifest(2), {"master/weight": torch.ones(6)})
        outcome = _settled(saver)
        assert "rank 0: [Errno 28] No space left on device" in outcome.problem
        assert not outcome.is_outage
    assert (saver.folder.steps(), saver.folder.pointer(), saver.folder.debris()) == ([1], 1, {})
    saver.save(_manifest(3), {"master/weight": torch.ones(6)})
    assert not _settled(saver).problem
    assert saver.folder.steps() == [1, 3]


def test_a_commit_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards are written, but the manifest is not: it was no checkpoint."""
    saver = _saver(tmp_path)

    def fail(*_: Any) -> None:
        raise StoreUnavailable("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "commit", fail)
        saver.save(_manifest(2), {"master/weight": torch.ones(6)})
        outcome = _settled(saver)
        assert (outcome.problem, outcome.is_outage) == ("the store is away", True)
    assert (saver.folder.steps(), saver.folder.pointer(), saver.folder.debris()) == ([], None, {})


def test_old_ones_go_after_the_commit(tmp_path: Path) -> None:
    """The policy says which; one that cannot be deleted now goes after the next save, and is no failure of this one."""
    saver = _saver(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        saver.save(_manifest(step), {"master/weight": torch.ones(6)})
        assert not _settled(saver).problem
    assert saver.folder.steps() == [2, 3]


def test_an_old_one_that_cannot_be_deleted_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new one is committed all the same, and the reason is said."""
    saver = _saver(tmp_path, keep_last=2)

    def fail(self: CheckpointFolder, step: int) -> None:
        raise OSError("busy")

    monkeypatch.setattr(CheckpointFolder, "remove", fail)
    for step in (1, 2, 3):
        saver.save(_manifest(step), {"master/weight": torch.ones(6)})
        assert not _settled(saver).problem
    assert saver.folder.steps() == [1, 2, 3]
    assert "were not deleted: busy" in capsys.readouterr().err


def test_what_is_left_of_a_deletion_that_failed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody reads a file of an old checkpoint on NFS: its folder stays for a while, and saves go on."""
    saver, delete = _saver(tmp_path, keep_last=2), shutil.rmtree

    def busy(folder: Path) -> None:
        if folder.name == "step-00000001":
            raise OSError(errno.EBUSY, "busy", str(folder / ".nfs0001"))
        delete(folder)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        for step in (1, 2, 3, 4):
            saver.save(_manifest(step), {"master/weight": torch.ones(6)})
            assert not _settled(saver).problem
        assert (saver.folder.steps(), list(saver.folder.debris())) == ([3, 4], ["step-00000001"])
        assert "step-00000001, which is no checkpoint, was not deleted: [Errno 16] busy" in capsys.readouterr().err
    saver.save(_manifest(5), {"master/weight": torch.ones(6)})
    assert (_settled(saver).problem, saver.folder.debris()) == ("", {})
