"""Refusals before a job is submitted: each one, all at once, without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import local_executor
from launcher.cluster import ClusterConfig
from launcher.job import Submission
from launcher.preflight import check
from launcher.preflight.findings import PreflightFinding, Subject, make_note, problem
from launcher.preflight.report import PreflightError, Report
from launcher.preflight.runs import library_checks
from launcher.preflight.scheduler import ranks_and_gpus
from launcher.preflight.storage import wandb_key
from launcher.submit import SubmissionRequest, command_request, sweep_request, train_request
from regen_dist.config import to_yaml
from regen_dist.errors import BackendError
from regen_dist.programs import regen
from tests.helpers.commands import run_here
from tests.helpers.tiny import tiny_run

HERE = {"kind": "local"}


def order(cluster: dict[str, Any] | None = None, **changes: Any) -> SubmissionRequest:
    """A run of four clips a step under ZeRO-3, on this machine unless told otherwise."""
    config = tiny_run(changes.pop("output", "runs"), **{"engine__kind": "zero3", **changes})
    return train_request(config, ClusterConfig.model_validate(cluster or HERE), "test")


def problems(found: Iterator[PreflightFinding]) -> list[str]:
    return [each.text for each in found if each.forbids]


def notes(found: Iterator[PreflightFinding]) -> list[str]:
    return [each.text for each in found if not each.forbids]


def test_ranks_that_share_a_gpu() -> None:
    told = problems(ranks_and_gpus(Subject(order({"kind": "local", "gpus_per_node": 1, "tasks_per_node": 2}))))
    assert told == ["2 ranks on a node of 1 GPU(s), and each needs one; set --tasks-per-node 1"]


def test_gpus_that_idle_are_a_note() -> None:
    subject = Subject(order({"kind": "local", "gpus_per_node": 8, "tasks_per_node": 2}))
    assert problems(ranks_and_gpus(subject)) == []
    assert notes(ranks_and_gpus(subject)) == ["6 of 8 GPUs of each node will idle: each rank uses one, and there are 2"]


def test_wandb_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    online = {"wandb__mode": "online"}
    told = problems(wandb_key(Subject(order(**online))))
    assert len(told) == 1
    assert f"WANDB_API_KEY is not set, and {tmp_path}/netrc has none for api.wandb.ai; run `wandb login`" in told[0]
    assert list(wandb_key(Subject(order(wandb__mode="offline")))) == []
    assert list(wandb_key(Subject(order({**HERE, "environment": {"WANDB_API_KEY": "x"}}, **online)))) == []
    (tmp_path / "netrc").write_text("machine other.example login a password b\n")
    assert problems(wandb_key(Subject(order(**online)))) == told
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert list(wandb_key(Subject(order(**online)))) == []


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """`regen check` runs in this process."""
    monkeypatch.setattr(subprocess, "run", run_here)


@pytest.mark.usefixtures("quickly")
def test_several_runs_with_the_same_problem_are_told_once() -> None:
    runs = [
        tiny_run(name=f"run{n}", engine__kind="zero3", train__batch_global=b) for n, b in enumerate((4, 4, 4, 4, 6))
    ]
    swept = sweep_request([(run, "run") for run in runs], ClusterConfig(kind="local", tasks_per_node=3), "test")
    told = problems(library_checks(Subject(swept, produced=["data"])))
    assert sum("train.batch_global 4" in each for each in told) == 1
    assert any(each.startswith("run0, run1, run2 and 1 more: train.batch_global 4") for each in told)


def test_the_library_is_told_where_the_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks, GPUs, another Python, what an earlier job makes and --fresh come through to `regen check`, which a process
    is first, started from a folder that is no checkout."""
    monkeypatch.chdir(tmp_path)
    flash = {"model__decoder__attention": {"backend": "flash"}, "engine__precision": "bf16"}
    data = str(tmp_path / "made")
    cluster = {"kind": "local", "gpus_per_node": 4, "tasks_per_node": 3}
    config = {"output": str(tmp_path), "data__url": data, "data__validation_url": data}
    told = problems(library_checks(Subject(order(cluster, **config, **flash))))
    assert len(told) == 3, told
    assert any("4 samples at a time, not a multiple of 3 ranks" in each for each in told)
    assert any("flash needs the package flash-attn" in each for each in told)
    assert any(f"there is no folder {data}" in each for each in told)
    monkeypatch.setattr(subprocess, "run", run_here)
    elsewhere = {**cluster, "tasks_per_node": 4, "python": "apptainer exec --nv image.sif python"}
    assert problems(library_checks(Subject(order(elsewhere, **config, **flash), produced=[data]))) == []


def test_a_library_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    report = check(order(), checks=[library_checks])
    assert report.problems == ["`regen check` failed: exit code 1"]


def test_a_check_that_stumbles_does_not_hide_the_others() -> None:
    def stumbles(subject: Subject) -> Iterator[PreflightFinding]:
        yield problem("never told, for it goes wrong later")
        raise ZeroDivisionError("by accident")

    def refuses(subject: Subject) -> Iterator[PreflightFinding]:
        raise BackendError("no answer")

    def tells(subject: Subject) -> Iterator[PreflightFinding]:
        yield make_note("by the way")
        yield problem("wrong")

    report = check(order(), checks=[stumbles, refuses, tells])
    assert report.problems[1:] == ["no answer", "wrong"]
    assert "stumbles itself failed: ZeroDivisionError: by accident" in report.problems[0]
    assert report.notes == ["by the way"]


def test_all_problems_are_in_one_error() -> None:
    with pytest.raises(PreflightError, match=r"(?s)tiny was not submitted: 2 problems\n  - one\n  - two\n.*--force"):
        Report(problems=["one", "two"]).raise_problems("tiny")
    Report(notes=["only a note"]).raise_problems("tiny")


def test_the_storage_variables_of_a_cluster_count_while_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("AWS_REGION", "here")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    seen = []

    def look(subject: Subject) -> Iterator[PreflightFinding]:
        seen.append((os.environ.get("AWS_REGION"), os.environ.get("AWS_ENDPOINT_URL"), os.environ.get("OTHER")))
        yield from ()

    environment = {"AWS_REGION": "there", "AWS_ENDPOINT_URL": "http://store", "OTHER": "x"}
    check(order({**HERE, "environment": environment}), checks=[look])
    assert seen == [("there", "http://store", None)]
    assert os.environ["AWS_REGION"] == "here"
    assert "AWS_ENDPOINT_URL" not in os.environ


def test_a_command_that_is_no_training_is_checked_too(tmp_path: Path) -> None:
    report = check(
        command_request("shards", tmp_path / "job", ["shards", "build"], ClusterConfig(kind="local"), "test")
    )
    assert report.problems == []


@pytest.mark.usefixtures("quickly")
def test_everything_that_is_wrong_is_told_at_once_and_force_submits_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends with exit code 2, each problem a line, nothing left; with --force they are warnings."""
    started: list[Submission] = []
    monkeypatch.setattr(local_executor, "start_locally", lambda job: started.append(job) or "12")
    config = tmp_path / "tiny.yaml"
    config.write_text(to_yaml(tiny_run("runs", "nowhere", optimizer__kind="cpu_adam", wandb__mode="offline")))
    asked = regen("submit", "train", str(config), "--tasks-per-node", "2")
    refused = run_here(asked, cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "tiny was not submitted: 3 problems\n" in refused.stderr
    for told in (
        "  - engine.kind=plain trains in one process, found 2 ranks",
        "  - optimizer.kind=cpu_adam is DeepSpeed's",
        f"  - data: there is no folder {tmp_path}/nowhere",
        "submit with --force",
    ):
        assert told in refused.stderr
    assert not (tmp_path / "runs").exists()
    assert not started
    forced = run_here([*asked, "--force"], cwd=tmp_path)
    assert forced.returncode == 0, forced.stderr
    assert forced.stdout.startswith("submitted tiny on this machine as job ")
    assert forced.stderr.count("warning: submitted despite: ") == 3
    assert [(job.name, job.world_size, job.tasks[0].command[0]) for job in started] == [("tiny", 2, "train")]


def test_no_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_run("runs", "nowhere")))
    code = (
        "import sys; from launcher.cluster import load_cluster; from launcher.preflight import check\n"
        "sys.executable = '/bin/false'  # which is started in place of `regen check`\n"
        "from launcher.submit import train_request; from regen_dist.config import load_config\n"
        "report = check(train_request(load_config('tiny.yaml'), load_cluster('local'), 'local'))\n"
        "assert report.problems == ['`regen check` failed: exit code 1'], report\n"
        "sys.exit(bool({'torch', 'numpy', 'deepspeed'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
