"""Runs that end before their time, and what the same command makes of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from regen_dist.checkpoint.commit import CheckpointStore
from tests.fault.conftest import SAVE_EVERY, STEPS, losses
from tests.helpers.processes import wait_until_gone
from tests.helpers.ranks import run_regen, start_regen, wait_for_step


def _children(process_id: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def test_a_killed_run_comes_back_by_the_same_command(config: Path, undisturbed: list[float]) -> None:
    """SIGKILL in the middle, with nothing saved since the last checkpoint: the ranks go with their launcher, the same
    command goes on from the last committed checkpoint, and the losses are those of the undisturbed run, bit for bit."""
    run, command = config.parent / "runs" / "killed", ("train", config, "--ranks", 2, "name=killed")
    process = start_regen(*command, log=config.with_name("killed.log"))
    try:
        wait_for_step(run, SAVE_EVERY + 2, process)
        ranks = _children(process.pid)
        assert len(ranks) == 2
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until_gone(ranks)
    saved = CheckpointStore(run).latest()
    assert saved is not None
    assert SAVE_EVERY <= saved.step < STEPS
    assert run_regen(*command, log=config.with_name("killed_again.log")) == 0
    assert f"resumed at step {saved.step} on 2 rank(s)" in config.with_name("killed_again.log").read_text()
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
    saved = CheckpointStore(terminated).latest()
    assert saved is not None
    assert saved.step < STEPS
    assert saved.step == len(losses(terminated)), "the last step that was made is the one that was saved"
    assert f"stopped by SIGTERM after step {saved.step}: run it again to go on" in text
    copy = terminated.with_name("terminated_copy")
    shutil.copytree(terminated, copy)
    command = ("train", config, "--ranks", 2, "name=terminated_copy")
    assert run_regen(*command, log=config.with_name("terminated_again.log")) == 0
    assert losses(copy) == undisturbed


def test_a_cut_checkpoint_is_an_error_and_no_new_start(terminated: Path, config: Path) -> None:
    """One rank's file is shorter than it was: every rank refuses, exit code 4, a message with the file's name, and
    nothing is trained from scratch or overwritten."""
    run = terminated.with_name("cut")
    shutil.copytree(terminated, run)
    shard = next(run.glob("checkpoints/step-*/rank-00001-of-00002.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    before = (run / "metrics.jsonl").read_bytes(), (run / "checkpoints" / "latest").read_bytes()
    log = config.with_name("cut.log")
    assert run_regen("train", config, "--ranks", 2, "name=cut", log=log) == 4
    text = log.read_text()
    assert 1 <= text.count(f"error: checkpoint {shard.parent}: {shard.name} has") <= 2, "by rank 0, and of rank 1's log"
    assert "Traceback" not in text
    assert ((run / "metrics.jsonl").read_bytes(), (run / "checkpoints" / "latest").read_bytes()) == before


def test_a_missing_pointer_is_an_error_and_no_new_start(terminated: Path, config: Path) -> None:
    """The pointer `latest` is gone while there are checkpoints: exit code 4 again (one plain process is enough)."""
    run = terminated.with_name("pointerless")
    shutil.copytree(terminated, run)
    (run / "checkpoints" / "latest").unlink()
    log = config.with_name("pointerless.log")
    assert run_regen("train", config, "name=pointerless", "engine.kind=plain", log=log) == 4
    assert "no pointer `latest`" in log.read_text()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["world_size"] == 2
