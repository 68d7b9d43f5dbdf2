"""The same run started twice: one trains, the other is told who does, and a killed one is in nobody's way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from regen_dist.config import to_yaml
from regen_dist.observe.record import read_record
from tests.helpers.checkpoints import folder_of
from tests.helpers.commands import regen_here
from tests.helpers.machine import wait_until_gone
from tests.helpers.ranks import run_ranks, run_regen_alone, said, start_regen, wait_for_step
from tests.helpers.tiny import tiny_dataset, tiny_run

STEPS = 4000  # more than are made while four other starts are refused


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny_run(tmp_path / "runs", data, train__steps=STEPS, checkpoint__every=20)))
    return path


def _ended(process: subprocess.Popen[bytes], timeout_s: float = 120.0) -> int:
    try:
        return process.wait(timeout_s)
    finally:
        process.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _rank_of(run: Path) -> int:
    """The process that holds the claim."""
    import json

    (claim,) = (run / "claims").glob("*.json")
    return int(json.loads(claim.read_text())["pid"])


def test_a_second_start_is_refused_and_disturbs_nothing(config: Path, tmp_path: Path) -> None:
    """Refused by the launcher, and by a rank that another launcher starts; the one that trains ends as if nothing had
    been, and then the same command continues."""
    run, logs = tmp_path / "runs" / "tiny", tmp_path / "second"
    run_ranks(time.time, 1)  # what the second start is forked from is there before the first trains
    first = start_regen("train", config, log=tmp_path / "first.log")
    try:
        wait_for_step(run, 5, first)
        stop = run / "STOP"
        assert run_regen_alone("train", config, logs=logs) == 8
        told = said(logs)[0]
        assert f"rank 0 on {os.uname().nodename} (process {_rank_of(run)}) since 20" in told
        assert "Traceback" not in told
        environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        alone = subprocess.run(
            ["regen", "train", str(config)], env={**environment, "MASTER_PORT": str(_free_port())}, capture_output=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert alone.returncode == 8, alone.stderr.decode()
        refused = regen_here("submit", "train", config, cwd=tmp_path, env=os.environ)
        assert refused.returncode != 0
        assert "already being trained by rank 0" in refused.stderr
        stop.touch()
        assert _ended(first) == 75
    finally:
        first.kill()
    lines = read_record(run / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert folder_of(run).debris() == {}
    assert list((run / "claims").glob("*.json")) == []


def test_two_starts_at_once(config: Path, tmp_path: Path) -> None:
    """Neither sees the other at first: one of them trains, the other ends with code 8."""
    run = tmp_path / "runs" / "tiny"
    both = [start_regen("train", config, "train.steps=60", log=tmp_path / f"{number}.log") for number in range(2)]
    codes = sorted(_ended(process, 120.0) for process in both)
    assert codes == [0, 8]
    assert [line["step"] for line in read_record(run / "metrics.jsonl", "train")] == list(range(1, 61))


def test_a_killed_run_is_in_nobodys_way(config: Path, tmp_path: Path) -> None:
    """SIGKILL of launcher and rank: the claim stays behind, and the next start does not wait."""
    run = tmp_path / "runs" / "tiny"
    first = start_regen("train", config, log=tmp_path / "first.log")
    wait_for_step(run, 25, first)
    rank = _rank_of(run)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    wait_until_gone([rank])
    assert len(list((run / "claims").glob("*.json"))) == 1
    logs = tmp_path / "second"
    assert run_regen_alone("train", config, "train.steps=40", logs=logs) == 0
    assert "resumed at step 20" in said(logs)[0]
    assert "waiting" not in said(logs)[0]
    assert list((run / "claims").glob("*.json")) == []
