"""Runs that end before their time, and what the same command makes of them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.fault.conftest import SAVE_EVERY, STEPS, losses
from tests.helpers.checkpoints import folder_of, newest
from tests.helpers.machine import wait_until_gone
from tests.helpers.ranks import run_regen_ranks, said, start_regen, wait_for_step


def _children(process_id: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def test_a_killed_run_comes_back_by_the_same_command(config: Path, undisturbed: list[float]) -> None:
    """SIGKILL in the middle, with nothing saved since the last checkpoint: the ranks go with their launcher, the same
    command goes on from the last committed checkpoint, and the losses are those of the undisturbed run, bit for bit."""
    run, logs = config.parent / "runs" / "killed", config.with_name("killed_again")
    process = start_regen("train", config, "--ranks", 2, "name=killed", log=config.with_name("killed.log"))
    try:
        wait_for_step(run, SAVE_EVERY + 2, process)
        ranks = _children(process.pid)
        assert len(ranks) == 2
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until_gone(ranks)
    saved = newest(run)
    assert SAVE_EVERY <= saved.step < STEPS
    assert run_regen_ranks("train", config, "name=killed", logs=logs) == [0, 0]
    assert f"resumed at step {saved.step} on 2 rank(s)" in said(logs)[0]
    assert losses(run) == undisturbed


@pytest.fixture(scope="module")
def terminated(config: Path) -> Path:
    """A run whose launcher got SIGTERM, with the test that it said so."""
    run = config.parent / "runs" / "terminated"
    process = start_regen("train", config, "--ranks", 2, "name=terminated", log=config.with_name("terminated.log"))
    try:
        wait_for_step(run, 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == os.EX_TEMPFAIL == 75
    finally:
        process.kill()
    return run


def test_sigterm_saves_and_asks_to_be_resumed(terminated: Path, config: Path, undisturbed: list[float]) -> None:
    """SIGTERM to the launcher: every rank stops after the same step, it is saved, the exit code is 75, the message says
    what to do; the same command then ends with the undisturbed run's losses, bit for bit."""
    text = config.with_name("terminated.log").read_text()
    saved = newest(terminated)
    assert saved.step < STEPS
    assert saved.step == len(losses(terminated)), "the last step that was made is the one that was saved"
    assert f"stopped by SIGTERM after step {saved.step}: run it again to go on" in text
    copy = terminated.with_name("terminated_copy")
    shutil.copytree(terminated, copy)
    logs = config.with_name("terminated_again")
    assert run_regen_ranks("train", config, "name=terminated_copy", logs=logs) == [0, 0]
    assert f"resumed at step {saved.step} on 2 rank(s)" in said(logs)[0]
    assert losses(copy) == undisturbed


def test_a_missing_pointer_is_no_new_start(terminated: Path, config: Path, undisturbed: list[float]) -> None:
    """The pointer `latest` is gone while there is a checkpoint: the run goes on from the newest one, writes the pointer
    again, and ends with the undisturbed run's losses, bit for bit. (Damaged files: test_damaged_checkpoints.py.)"""
    run = terminated.with_name("pointerless")
    shutil.copytree(terminated, run)
    saved = newest(run)
    (run / "checkpoints" / "latest").unlink()
    logs = config.with_name("pointerless")
    assert run_regen_ranks("train", config, "name=pointerless", logs=logs) == [0, 0]
    assert f"resumed at step {saved.step} on 2 rank(s)" in said(logs)[0]
    assert folder_of(run).pointer() == STEPS
    assert losses(run) == undisturbed
