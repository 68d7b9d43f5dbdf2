"""Saving in the background: one process here; ranks and deaths are in the suites dist and fault."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.saver import Outcome, Saver, to_delete
from regen_dist.config.run import CheckpointConfig
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import StoreUnavailable

PHASES = ["clear", "shard", "vote", "manifest", "rename", "pointer", "prune"]


def _manifest(step: int, psnr: float | None = None, rollbacks: Sequence[int] = ()) -> CheckpointManifest:
    return CheckpointManifest(
        step=step, samples=step, config_hash="", version="", topology={"world_size": 1}, state={},
        metrics={} if psnr is None else {"psnr_db": psnr}, rollbacks=list(rollbacks), shapes={"weight": [6]},
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
        assert "rank 0: [Errno 28] No space left on device" in _settled(saver).problem
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
        assert _settled(saver).problem == "the store is away"
    assert (saver.folder.steps(), saver.folder.pointer(), saver.folder.debris()) == ([], None, {})


def test_old_ones_go_after_the_commit(tmp_path: Path) -> None:
    """By the policy; one that cannot be deleted now goes after the next save, and is no failure of this one."""
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


# Retention: what is kept, and what is deleted.

RUN = [_manifest(step, psnr) for step, psnr in [(10, 20.0), (20, 25.0), (30, 22.0), (40, float("nan")), (50, None)]]


def _kept(
    run: Sequence[CheckpointManifest], newest: CheckpointManifest | None = None, bad: Sequence[int] = (), **policy: Any
) -> list[int]:
    pinned = policy.pop("pinned", set())
    deleted = to_delete(
        run, newest or run[-1], CheckpointConfig(**policy), pinned=pinned, is_good=lambda each: each.step not in bad
    )
    return sorted({each.step for each in run} - set(deleted))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep_last": 2}, [40, 50]),
        ({"keep_last": 3}, [30, 40, 50]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50]),
        ({"keep_last": 2, "keep_every": 20}, [20, 40, 50]),
        ({"keep_last": 2, "keep_best": 1}, [20, 40, 50]),
        ({"keep_last": 2, "keep_best": 2}, [20, 30, 40, 50]),
        ({"keep_last": 2, "keep_best": 1, "best_is": "min"}, [10, 40, 50]),
        ({"keep_last": 2, "keep_best": 1, "best_metric": "other"}, [40, 50]),
        ({"keep_last": 2, "pinned": {10}}, [10, 40, 50]),
    ],
)
def test_policies(policy: dict[str, Any], kept: list[int]) -> None:
    """The last, every n-th, the best, and pinned ones; together, where several are asked for."""
    assert _kept(RUN, **policy) == kept


def test_the_best_is_the_one_that_was_measured() -> None:
    """Later checkpoints have the figures of the newest validation, too, until the next one."""
    run = [_manifest(step, psnr) for step, psnr in [(10, 20.0), (20, 25.0), (30, 25.0), (40, 25.0), (50, 22.0)]]
    run += [_manifest(60, 22.0), _manifest(70, 22.0)]
    assert _kept(run, keep_last=2, keep_best=1) == [20, 60, 70]
    assert _kept(run, keep_last=2, keep_best=2) == [20, 50, 60, 70]


def test_bad_ones_do_not_count() -> None:
    """Two good ones stay, however many bad ones are newer."""
    assert _kept(RUN, keep_last=2, bad=[50, 40]) == [20, 30]
    assert _kept(RUN, keep_last=2, keep_best=1, bad=[20]) == [30, 40, 50]


def test_nothing_goes_while_fewer_than_two_are_good() -> None:
    """Even when the policy would have it."""
    assert _kept(RUN, keep_last=2, bad=[10, 20, 30, 40]) == [10, 20, 30, 40, 50]


def test_a_given_up_future_does_not_count_and_goes() -> None:
    """After a rollback to step 20 the steps 30 to 50 of before are neither good nor kept."""
    run = [*RUN[:1], _manifest(20, rollbacks=[20]), *RUN[2:], _manifest(35, rollbacks=[20])]
    assert _kept(run, newest=run[-1], keep_last=3) == [10, 20, 35]


def test_what_somebody_has_pointed_back_from_stays() -> None:
    """Who sets `latest` to an older step by hand does not lose the later ones by that."""
    assert _kept(RUN, newest=RUN[2], keep_last=2) == [20, 30, 40, 50]
