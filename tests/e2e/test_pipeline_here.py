"""A pipeline on this machine whose command is ended midway: nothing runs twice, the same command continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launcher.job import newest_job
from launcher.submit import is_alive
from regen_dist.config import to_yaml
from tests.helpers.launching import Submitter, attempts, held, losses, told, wait_until, whys
from tests.helpers.tiny import tiny_dataset, tiny_run

STEPS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a pipeline of a training and of something after it."""
    made = tiny_run(tmp_path / "runs", tiny_dataset(tmp_path / "data"), train__steps=STEPS, checkpoint__every=4)
    (tmp_path / "tiny.yaml").write_text(to_yaml(made))
    steps = {"embedder": {"train": "tiny.yaml"}, "look": {"command": ["config", "show", "tiny.yaml"]}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "steps": steps}, sort_keys=False))
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the pipeline in the background."""
    started: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tools.cli", "submit", "pipeline", "p.yaml"]
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_told_to_end_it_saves_and_goes_on_later(folder: Path, start: Callable[[], subprocess.Popen[str]]) -> None:
    """And while it works, another command does not."""
    run, first = folder / "runs" / "tiny", start()
    with held(run, 1, 2):
        other = Submitter(folder, {})("pipeline", "p.yaml")
        assert other.returncode == 1
        assert f"another `regen submit pipeline` (process {first.pid} on {os.uname().nodename})" in other.stderr
        first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert said.splitlines()[-1] == "stopped; the same command continues"
    assert whys(run) == ["stopped"]
    again = Submitter(folder, {})("pipeline", "p.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert whys(run) == ["stopped", "done"]
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert whys(folder / "runs" / "p" / "look") == ["done"]


def test_a_terminal_that_is_closed_leaves_the_step_running(
    folder: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    """The same command waits for it, and goes on."""
    run, first = folder / "runs" / "tiny", start()
    with held(run, 1, 2):
        first.send_signal(signal.SIGHUP)
        first.communicate(timeout=60)
        job = newest_job(run)
        assert job is not None
        assert is_alive(job)
        assert attempts(folder / "runs" / "p" / "look") == []
        second = start()
        assert second.stdout is not None
        line = second.stdout.readline()
        assert line == f"embedder: not submitted again, job {job.id()} runs or waits\n"
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    wait_until(lambda: not is_alive(job), lambda: told(run))
    assert whys(run) == ["done"]
    assert whys(folder / "runs" / "p" / "look") == ["done"]
