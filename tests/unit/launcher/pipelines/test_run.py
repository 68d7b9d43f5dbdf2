"""What is made of a plan: the checks of all steps, one command at a time, steps that are refused, what is printed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher import slurm
from launcher.job import Submission, new_folder
from launcher.pipelines import run
from launcher.pipelines.planning import PlannedStep, plan
from launcher.pipelines.run import check_all, pipeline_lock, run_locally, run_on_slurm, scripts, table
from launcher.pipelines.schema import load_pipeline
from launcher.preflight import Report
from launcher.preflight.report import PreflightError
from launcher.submit import SubmissionRequest
from regen_dist.errors import BackendError, DataError, RegenError

STEPS = {
    "first": {"command": ["look", "{task}"], "array": 5, "outputs": ["s3://data/train/manifest.json"]},
    "second": {"command": ["see"], "outputs": ["made"]},
    "third": {"command": ["tell", "it's $(odd)"], "after": ["first", "second"]},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(cluster: str = "loopback") -> list[PlannedStep]:
    Path("p.yaml").write_text(yaml.safe_dump({"name": "p", "steps": STEPS}, sort_keys=False))
    return plan(load_pipeline(Path("p.yaml")), cluster, [])


class Scheduler:
    """Takes jobs, all but those that it is told to refuse."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> None:
        self.refuses, self.taken, self.cancelled = refuses, list[tuple[str, str | None]](), list[str]()
        monkeypatch.setattr(run, "submit", self.submit)
        monkeypatch.setattr(slurm, "cancel", self.cancelled.append)

    def submit(self, request: SubmissionRequest, dependency: str | None = None) -> Submission:
        if request.name == self.refuses:
            raise BackendError("Slurm refused the job: no")
        self.taken.append((request.name, dependency))
        job = request.job(new_folder(request.base), Path("code"))
        (job.folder / "job_id").write_text(f"{100 + len(self.taken)}\n")
        return job


def test_jobs_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, lines = Scheduler(monkeypatch), list[str]()
    jobs = run_on_slurm(planned(), lines.append)
    assert scheduler.taken == [("p.first", None), ("p.second", "afterok:101"), ("p.third", "afterok:101:102")]
    assert {name: job.id() for name, job in jobs.items()} == {"first": "101", "second": "102", "third": "103"}
    assert lines[0] == "first: job 101, 5 task(s) (it has not run yet)"
    assert lines[2] == "third: job 103, after first and second (it has not run yet)"


def test_what_was_submitted_before_a_refusal_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(monkeypatch, refuses="p.third")
    with pytest.raises(RegenError, match=r"step third: Slurm refused the job: no; cancelled again: first \(job 101\)"):
        run_on_slurm(planned(), print)
    assert scheduler.cancelled == ["101", "102"]


def test_what_could_not_be_cancelled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller that refused the last step may be out of reach for the first ones, too."""

    def silent(job: str) -> None:
        raise BackendError("no answer")

    Scheduler(monkeypatch, refuses="p.second")
    monkeypatch.setattr(slurm, "cancel", silent)
    expected = r"step second: Slurm refused.*; could NOT be cancelled, and will run: first \(job 101: no answer\)"
    with pytest.raises(RegenError, match=expected):
        run_on_slurm(planned(), print)


def test_the_problems_of_all_steps_forbid_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check knows what the steps before it make."""
    known: dict[str, list[str]] = {}

    def check(request: SubmissionRequest, produced: list[str]) -> Report:
        known[request.name] = [*produced]
        return Report(problems=[f"bad {request.name}"] if request.name != "p.second" else [], notes=["by the way"])

    monkeypatch.setattr(run, "check", check)
    said = list[str]()
    with pytest.raises(PreflightError) as caught:
        check_all(planned(), force=False, emit=said.append)
    assert str(caught.value).splitlines()[:3] == [
        "nothing was submitted: 2 problem(s)", "  - first: bad p.first", "  - third: bad p.third",
    ]  # fmt: skip
    assert said == [f"note: {name}: by the way" for name in STEPS]
    assert known["p.first"] == []
    produced = ["s3://data/train/manifest.json", "s3://data/train", str(Path("runs/p/first").absolute())]
    assert known["p.second"] == produced
    assert known["p.third"] == [*produced, "made", str(Path("runs/p/second").absolute())]
    check_all(planned(), force=True, emit=said.append)
    assert said[-1] == "warning: submitted despite: third: bad p.third"


def test_on_this_machine_a_failure_stops_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, lines = Scheduler(monkeypatch), list[str]()
    codes = {"p.first": 0, "p.second": 4}
    monkeypatch.setattr(run, "missing_outputs", lambda request, step: {})
    monkeypatch.setattr(run, "wait_for", lambda job: codes[job.name])
    assert run_locally(planned("local"), lines.append) == 4
    assert [name for name, _ in scheduler.taken] == ["p.first", "p.second"]
    assert lines[-1] == "second ended with exit code 4; nothing after it was started"


def test_a_step_that_does_not_make_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what follows would fail, or the pipeline never be complete, without a word of why."""
    Scheduler(monkeypatch)
    monkeypatch.setattr(run, "wait_for", lambda job: 0)
    second = [each for each in planned("local") if each.name == "second"]
    with pytest.raises(DataError, match="step second ended well, but made is not there"):
        run_locally(second, print)


def test_the_tasks_that_are_left_are_judged_by_their_own_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    Scheduler(monkeypatch)
    monkeypatch.setattr(run, "wait_for", lambda job: 0)
    monkeypatch.setitem(STEPS["first"], "outputs", ["out/{task}-of-{tasks}"])
    (first,) = (each for each in planned("local") if each.name == "first")
    part = replace(first, request=first.request.part(first.request.tasks[3:4]))
    with pytest.raises(DataError, match="but out/3-of-5 is not there"):
        run_locally([part], print)
    Path("out").mkdir()
    Path("out/3-of-5").touch()
    assert run_locally([part], print) == 0


def test_one_command_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "p"
    with pipeline_lock(folder):
        program = (
            "import sys; from pathlib import Path; from launcher.pipelines.run import pipeline_lock\n"
            "with pipeline_lock(Path(sys.argv[1])): pass"
        )
        other = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=False)
        assert f"in use by process {os.getpid()} on " in other.stderr
        assert "it submits the same pipeline: wait for its end" in other.stderr
    with pipeline_lock(folder):
        pass


def test_a_folder_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pipeline_lock(tmp_path):
        assert "supports no locks (Function not implemented)" in capsys.readouterr().err


def test_the_plan_that_is_printed() -> None:
    lines = list(table(planned()))
    assert lines[0].split("  ")[0] == "step"
    assert " ".join(lines[1].split()) == "first - look {task} run 1 x 1 5 it has not run yet"
    assert lines[3].split()[:3] == ["third", "first,", "second"]
    assert len({line.index("run") for line in lines[1:]}) == 1, "columns stand under each other"


def test_the_scripts_that_are_printed() -> None:
    text = "\n".join(scripts(planned()))
    assert "# regen look 2\n# … 5 tasks in all\n#!/bin/bash" in text
    assert "# regen tell 'it'\"'\"'s $(odd)'" in text
    assert "#SBATCH --dependency=afterok:JOB-OF-first:JOB-OF-second" in text
    assert text.count("#SBATCH --kill-on-invalid-dep=yes") == 2
    assert "#SBATCH" not in "\n".join(scripts(planned("local")))
