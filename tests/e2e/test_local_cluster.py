"""`regen submit --cluster local` and pipelines on this machine: started again after kills, continued after an end."""

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
from tests.helpers.jobs import (
    Submitter,
    attempts,
    has_been_told,
    held,
    losses,
    told,
    wait_for_end,
    wait_until,
    whys,
)
from tests.helpers.ranks import run_regen_ranks, said
from tests.helpers.tiny import tiny_dataset, tiny_run

STEPS = 30
TWO_RANKS = ("--tasks-per-node", 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a dataset, and the config of a run of two ranks."""
    url = tiny_dataset(tmp_path / "data")
    made = tiny_run(tmp_path / "runs", url, engine__kind="zero3", train__steps=STEPS, checkpoint__every=10)
    (tmp_path / "tiny.yaml").write_text(to_yaml(made))
    return tmp_path


def submitter(folder: Path) -> Submitter:
    return Submitter(folder, {}, own_process=True)


def test_a_rank_that_is_killed_is_started_again(folder: Path) -> None:
    """The losses are those of a run that nothing happened to."""
    first, second, logs = folder / "runs" / "first", folder / "runs" / "second", folder / "first"
    assert run_regen_ranks("train", folder / "tiny.yaml", "name=first", logs=logs) == [0, 0], said(logs)
    submitter(folder).job(second, "train", "tiny.yaml", "name=second", *TWO_RANKS)
    with held(second, 2, 12) as ranks:
        os.kill(ranks[1], signal.SIGKILL)
    assert wait_for_end(second) == "done", told(second)
    assert whys(second) == ["failed", "done"]
    assert attempts(second)[1].start.step in (10, 20)
    assert losses(first) == losses(second)


def test_a_time_limit_begins_anew_with_every_start(folder: Path) -> None:
    """Two minutes, told 25 seconds after the start: saved, started again by Submitit, done."""
    run = folder / "runs" / "limited"
    limit = ("--time", 2, "--set", "signal_lead_s=95", "engine.kind=plain")
    job = submitter(folder).job(run, "train", "tiny.yaml", "name=limited", *limit)
    with held(run, 1, 3) as ranks:
        wait_until(lambda: all(has_been_told(each, signal.SIGUSR2) for each in ranks.values()), lambda: told(run))
    assert wait_for_end(run, starts=2) == "done", told(run)
    assert whys(run)[0] == "time limit"
    assert set(whys(run)[1:-1]) <= {"time limit"}, "on a slow machine another time"
    wait_until(lambda: not is_alive(job), lambda: told(run))
    assert sorted(losses(run)) == list(range(1, STEPS + 1))


def test_waiting_for_a_command_brings_its_end_and_its_exit_code(folder: Path) -> None:
    submit = submitter(folder)
    for name, code in (("tiny.yaml", 0), ("none.yaml", 2)):
        waited = submit("run", f"show_{code}", "--wait", "--", "config", "show", name)
        assert waited.returncode == code, waited.stdout + waited.stderr
        assert whys(folder / "runs" / f"show_{code}") == ["failed" if code else "done"]


def test_a_pipeline_on_this_machine(folder: Path) -> None:
    """Step by step, to the first that fails; again, from there."""
    steps = {
        "embedder": {"train": "tiny.yaml", "overrides": ["name=piped", "engine.kind=plain", "train.steps=4"]},
        "model": {"command": ["checkpoint", "export", "runs/piped", "--out", "runs/model", "--no-statistics"],
                  "outputs": ["runs/model/config.yaml"]},
        "look": {"command": ["config", "show", "missing.yaml"]},
    }  # fmt: skip
    (folder / "p.yaml").write_text(yaml.safe_dump({"name": "p", "steps": steps}, sort_keys=False))
    submit = submitter(folder)
    failed = submit("pipeline", "p.yaml")
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "look ended with exit code 2" in failed.stdout
    (folder / "missing.yaml").symlink_to("tiny.yaml")
    again = submit("pipeline", "p.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line.partition(",")[0] for line in again.stdout.splitlines()[:2]] == ["embedder: skipped", "model: skipped"]
    last = submit("pipeline", "p.yaml")
    assert last.stdout.splitlines()[-1] == "nothing is left to do"
    job = newest_job(folder / "runs" / "p" / "look")
    assert job is not None
    assert not is_alive(job)


# A pipeline on this machine whose command is ended midway: nothing runs twice, the same command continues.


PIPELINE_STEPS = 12


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    """With a pipeline of a training and of something after it."""
    made = tiny_run(
        tmp_path / "runs", tiny_dataset(tmp_path / "data"), train__steps=PIPELINE_STEPS, checkpoint__every=4
    )
    (tmp_path / "tiny.yaml").write_text(to_yaml(made))
    steps = {"embedder": {"train": "tiny.yaml"}, "look": {"command": ["config", "show", "tiny.yaml"]}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "steps": steps}, sort_keys=False))
    return tmp_path


@pytest.fixture
def start(pipeline_folder: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the pipeline in the background."""
    started: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tools.cli", "submit", "pipeline", "p.yaml"]
        process = subprocess.Popen(
            command,
            cwd=pipeline_folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_told_to_end_it_saves_and_goes_on_later(
    pipeline_folder: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    """And while it works, another command does not."""
    run, first = pipeline_folder / "runs" / "tiny", start()
    with held(run, 1, 2):
        other = submitter(pipeline_folder)("pipeline", "p.yaml")
        assert other.returncode == 2
        assert f"is in use by process {first.pid} on {os.uname().nodename}; it submits the same" in other.stderr
        first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert said.splitlines()[-1] == "stopped; the same command continues"
    assert whys(run) == ["stopped"]
    again = submitter(pipeline_folder)("pipeline", "p.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert whys(run) == ["stopped", "done"]
    assert list(losses(run)) == list(range(1, PIPELINE_STEPS + 1))
    assert whys(pipeline_folder / "runs" / "p" / "look") == ["done"]


def test_a_terminal_that_is_closed_leaves_the_step_running(
    pipeline_folder: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    """The same command waits for it, and goes on."""
    run, first = pipeline_folder / "runs" / "tiny", start()
    with held(run, 1, 2):
        first.send_signal(signal.SIGHUP)
        first.communicate(timeout=60)
        job = newest_job(run)
        assert job is not None
        assert is_alive(job)
        assert attempts(pipeline_folder / "runs" / "p" / "look") == []
        second = start()
        assert second.stdout is not None
        line = second.stdout.readline()
        assert line == f"embedder: not submitted again, job {job.id()} runs or waits\n"
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    wait_until(lambda: not is_alive(job), lambda: told(run))
    assert whys(run) == ["done"]
    assert whys(pipeline_folder / "runs" / "p" / "look") == ["done"]
