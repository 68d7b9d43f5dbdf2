"""Answers of Slurm's programs, as its controller gives them, and what a task decides by them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import attempts, local_executor, retry, slurm
from launcher.attempts import Start, read_history, write_entry
from launcher.cluster import ClusterConfig
from launcher.job import Submission, new_folder, write_job
from launcher.preflight.findings import Subject
from launcher.preflight.scheduler import scheduler
from launcher.script import batch_script, submitit_parameters
from launcher.submit import command_request, is_alive, last_exit_code, submit, train_request
from regen_dist.errors import EXIT_RESUME, BackendError, RunBusy
from tests.helpers.tiny import tiny_run

Programs = Callable[..., Path]
RUNNING = "JobId=36 JobState=RUNNING Reason=None Restarts=0 PreemptTime=None EndTime=2030-01-01T00:00:00"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Install programs that print given outputs, one for each call and the last for ever; returns the log of calls.
    An output that begins with "!" is an error."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_PAUSE_S", 0.0)

    def install(**outputs: list[str]) -> Path:
        log.write_text("")
        for name in ("scontrol", "sinfo", "sbatch", "squeue"):
            answers = folder / f"{name}.json"
            answers.write_text(json.dumps(outputs.get(name, [""])))
            (folder / name).write_text(
                f"#!{sys.executable}\nimport json, sys\nargs = ' '.join(sys.argv[1:])\n"
                f"if {name!r} != 'sbatch': open({str(log)!r}, 'a').write({name!r} + ' ' + args + '\\n')\n"
                f"left = json.load(open({str(answers)!r}))\n"
                f"if len(left) > 1: json.dump(left[1:], open({str(answers)!r}, 'w'))\n"
                "print(left[0].lstrip('!'), file=sys.stderr if left[0].startswith('!') else sys.stdout)\n"
                "sys.exit(left[0].startswith('!'))\n"
            )
            (folder / name).chmod(0o755)
        return log

    return install


def _job(tmp_path: Path, tasks: int = 1, **cluster: Any) -> Submission:
    place = ClusterConfig.model_validate({"time_min": 9, "partition": "mine", **cluster})
    order = command_request("job", tmp_path / "job", ["shards", "verify", "{task}"], place, "test", tasks=tasks)
    job = order.job(tmp_path / "job" / "launch" / "D", tmp_path / "code").model_copy(update={"submitted": 10.0})
    write_job(job)
    return job


def _end(job: Submission, monkeypatch: pytest.MonkeyPatch, number: int = 0, code: int = EXIT_RESUME) -> int:
    """Return the exit code of the batch script of task `number` of job 36, whose ranks ended with `code`."""
    monkeypatch.setenv("SLURM_JOB_ID", "36")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if len(job.tasks) > 1:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "36")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
    write_entry(job.tasks[number].launch, Start(job="36", restart=0, nodes=("node1",), time=20.0))
    launch, step = job.tasks[number].launch, {"rank": 0, "node": "node1", "code": code, "signals": ()}
    attempts.write_rank_exit(launch, "36", 0, **step)
    return retry.main(["end", str(job.folder), str(code)])


def _asked(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("scontrol")]


def test_one_task_of_an_array_is_requeued_alone(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last task of an array has the array's own number as its job id."""
    log = programs(scontrol=[RUNNING])
    assert _end(_job(tmp_path, tasks=3), monkeypatch, number=2) == 0
    assert _asked(log)[-1] == "scontrol requeue 36_2"
    assert {line.split()[-1] for line in _asked(log)} == {"36_2"}


@pytest.mark.parametrize("code", [EXIT_RESUME, 137])
def test_a_cancelled_job_does_not_come_back(
    code: int, tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = programs(scontrol=["JobState=COMPLETING Reason=None Restarts=0 PreemptTime=None EndTime=2020-01-01T00:00:00"])
    job = _job(tmp_path)
    assert _end(job, monkeypatch, code=code) == code
    assert [line for line in _asked(log) if "requeue" in line] == []
    ((_, ended),) = read_history(job.tasks[0].launch)
    assert ended is not None
    assert (ended.why, ended.again) == ("stopped", False)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0 EndTime=2020-01-01T00:00:00", "time limit"),
        ("JobState=COMPLETING Reason=None Restarts=0 PreemptTime=2020-01-01T00:00:00", "preempted"),
        ("JobState=COMPLETING Reason=None Restarts=1 EndTime=Unknown", "signal"),  # Slurm has requeued it itself
        (RUNNING, "signal"),
        (f"{RUNNING} Comment=not PreemptTime=2020-01-01T00:00:00", "signal"),
    ],
)
def test_a_job_that_nobody_cancelled_goes_on(
    facts: str, why: str, tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = programs(scontrol=[facts])
    job = _job(tmp_path)
    assert _end(job, monkeypatch) == 0
    assert _asked(log)[-1] == "scontrol requeue 36"
    ended = read_history(job.tasks[0].launch)[0].end
    assert ended is not None
    assert ended.why == why


SILENT = "!slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def test_a_controller_that_restarts_is_asked_again(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = programs(scontrol=[SILENT, "!Socket timed out on send/recv operation", RUNNING, SILENT, ""])
    assert _end(_job(tmp_path), monkeypatch) == 0
    assert [line.split()[1] for line in _asked(log)] == ["show", "show", "show", "requeue", "requeue"]


def test_a_controller_that_stays_away_does_not_lose_the_end(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_PATIENCE_S", 0.0)
    programs(scontrol=[SILENT], sinfo=[SILENT])
    job = _job(tmp_path)
    assert _end(job, monkeypatch, code=137) == EXIT_RESUME
    ended = read_history(job.tasks[0].launch)[0].end
    assert ended is not None
    assert (ended.why, ended.at_fault) == ("failed", ("node1",))


def test_a_job_that_waits_already_was_requeued_by_an_earlier_try(programs: Programs) -> None:
    programs(scontrol=["!Job is pending execution for job 36"])
    slurm.requeue("36")
    programs(scontrol=["!Invalid job id specified"])
    with pytest.raises(BackendError, match="Invalid job id"):
        slurm.requeue("36")


def test_a_node_that_is_being_drained_has_lost_nothing(programs: Programs) -> None:
    programs(sinfo=["node1 mixed\nnode2 draining\nnode3 drained\nnode4 allocated*\nnode5 failing\nnode6 fail"])
    nodes = [f"node{number}" for number in range(1, 7)]
    assert slurm.lost_nodes(nodes) == ("node3", "node4", "node6")
    assert slurm.unavailable_nodes(None) == 5


@pytest.mark.parametrize(
    ("answers", "left_out"),
    [
        ([""], ("node4",)),
        (["!sbatch: error: not available"], ()),
        (["!allocation failure: Unable to contact slurm controller (connect failure)", ""], ("node4",)),
    ],
)
def test_nodes_are_excluded_where_slurm_could_start_the_job_without(
    answers: list[str], left_out: tuple[str, ...], tmp_path: Path, programs: Programs
) -> None:
    programs(sbatch=answers)
    job = _job(tmp_path, exclude=["node[2-3]"])
    assert retry.SlurmScheduler("36", 0, ()).excludable(job, ["node4"]) == left_out
    assert retry.SlurmScheduler("36", 0, ()).excludable(job, []) == ()


def test_a_job_is_requeued_where_a_node_cannot_be_excluded(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is not called ended."""
    programs(scontrol=[RUNNING, "", "!Access/permission denied"])
    job = _job(tmp_path)
    write_entry(job.tasks[0].launch, Start(job="35", restart=0, nodes=("node1",), time=1.0))
    write_entry(
        job.tasks[0].launch, retry.End(why="failed", code=1, text="", again=True, at_fault=("node1",), time=2.0)
    )
    assert _end(job, monkeypatch, code=137) == 0
    assert "warning: requeued, but node1 could not be excluded: scontrol update" in capsys.readouterr().err


def test_a_job_that_waits_for_nodes_that_are_down_is_not_refused(tmp_path: Path, programs: Programs) -> None:
    refused = "!sbatch: error: Batch job submission failed: Requested node configuration is not available"
    place = ClusterConfig(time_min=9, partition="mine", nodes=2)
    request = command_request("job", tmp_path / "job", ["shards", "verify"], place, "test")
    partition = "PartitionName=mine State=UP MaxTime=60:00 MaxNodes=2 TotalNodes=2"
    programs(sbatch=[refused], sinfo=["node1 idle\nnode2 drained"], scontrol=[partition])
    (note,) = scheduler(Subject(request))
    assert "1 node(s) are down or drained" in note.text
    assert not note.forbids
    programs(sbatch=[refused], sinfo=["node1 idle\nnode2 idle", "gpu|8|1000"], scontrol=[partition])
    (problem,) = scheduler(Subject(request))
    assert problem.forbids


def test_a_variable_within_a_variable_is_told(tmp_path: Path) -> None:
    """The environment of a cluster file passes through no shell."""
    values = {"PATH": "/opt/bin:$PATH", "PRICE": "5 $", "LD_LIBRARY_PATH": "/opt/lib:${LD_LIBRARY_PATH}"}
    place = ClusterConfig(kind="local", environment=values)
    (note,) = scheduler(Subject(command_request("job", tmp_path / "job", ["a"], place, "test")))
    assert "environment: PATH, LD_LIBRARY_PATH: `$` is taken literally" in note.text
    assert not note.forbids


def test_an_array_that_is_too_large_names_the_limit(tmp_path: Path, programs: Programs) -> None:
    request = command_request("job", tmp_path / "job", ["a"], ClusterConfig(time_min=9), "test", tasks=1200)
    programs(
        sbatch=["!allocation failure: Invalid job array specification"],
        scontrol=["PartitionName=mine Default=YES", "MaxArraySize            = 1001"],
    )
    (problem,) = scheduler(Subject(request))
    assert "array of 1200 tasks: allocation failure: Invalid" in problem.text
    assert "Its MaxArraySize is 1001" in problem.text


@pytest.mark.parametrize("state", ["SIGNALING", "STAGE_OUT", "RESIZING", "SPECIAL_EXIT", "RESV_DEL_HOLD", "RUNNING"])
def test_a_job_in_any_state_but_an_ended_one_is_alive(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(tmp_path)
    monkeypatch.setattr(Submission, "id", lambda _: "36")
    monkeypatch.setattr(slurm, "queue", lambda jobs: {jobs[0]: (state, "")})
    assert is_alive(job)
    monkeypatch.setattr(slurm, "queue", lambda jobs: {jobs[0]: ("CANCELLED", "")})
    assert not is_alive(job)


def test_a_refused_submission_leaves_the_run_as_it_was(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config by which a job may still run, the history of a command, and the wish that it stops."""
    monkeypatch.setattr("launcher.submit.take_snapshot", lambda _folder: tmp_path)
    programs(sbatch=["!sbatch: error: Invalid qos specification"])
    place = ClusterConfig(time_min=9)
    for request in (
        train_request(tiny_run(tmp_path / "runs"), place, "test"),
        command_request("job", tmp_path / "runs" / "job", ["shards", "verify"], place, "test"),
    ):
        (task,) = request.tasks
        write_entry(task.launch, Start(job="1", restart=0, nodes=(), time=1.0))
        (task.launch / "config.yaml").write_text("earlier")
        task.stop_file.touch()
        before = {path: path.read_bytes() for path in task.folder.rglob("*") if path.is_file()}
        with pytest.raises(BackendError, match="Slurm refused the job: sbatch: error: Invalid qos"):
            submit(request)
        assert {path: path.read_bytes() for path in task.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_interrupted_submission_leaves_the_run_as_it_was(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing that a job which Slurm has taken nevertheless could begin with."""

    def fail(*_: object) -> str:
        raise error

    monkeypatch.setattr("launcher.submit.take_snapshot", lambda _folder: tmp_path)
    monkeypatch.setattr("launcher.submit._sbatch", fail)
    request = train_request(tiny_run(tmp_path), ClusterConfig(time_min=9), "test")
    (request.tasks[0].launch / "config.yaml").parent.mkdir(parents=True)
    (request.tasks[0].launch / "config.yaml").write_text("earlier")
    with pytest.raises(type(error)):
        submit(request)
    assert (request.tasks[0].launch / "config.yaml").read_text() == "earlier"
    assert list(request.base.glob("launch/*/job.json")) == []


def test_ctrl_c_before_a_local_job_has_its_id_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    class Started(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(local_executor, "python", lambda *_: command)
    monkeypatch.setattr(local_executor.subprocess, "Popen", Started)
    monkeypatch.setattr(local_executor.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        local_executor.start_locally(_job(tmp_path, kind="local"))
    assert [each.returncode for each in started] == [-signal.SIGTERM]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            "!sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates",
            "refused the job: sbatch: error: QOSMaxSubmitJobPerUserLimit; sbatch: error: Batch job submission failed",
        ),
        ("!sbatch: error: Batch job submission failed: Unable to contact slurm controller", "Slurm did not answer: .*"),
        ("!no", "refused the job: no; change"),
    ],
)
def test_what_sbatch_said_is_told(
    answer: str, told: str, tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.submit.take_snapshot", lambda _folder: tmp_path)
    programs(sbatch=[answer])
    with pytest.raises(BackendError, match=told):
        submit(command_request("job", tmp_path / "job", ["shards"], ClusterConfig(time_min=9), "test"))


def test_of_two_commands_that_submit_a_run_one_does(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has looked for jobs before this one was there; and both give up where each sees the other's folder."""
    monkeypatch.setattr("launcher.submit.take_snapshot", lambda _folder: tmp_path)
    programs(sbatch=["Submitted batch job 36"])
    first, second = (train_request(tiny_run(tmp_path), ClusterConfig(time_min=9), "test") for _ in range(2))
    job = submit(first)
    with pytest.raises(RunBusy, match="another command submits it at this time"):
        submit(second)
    third = train_request(tiny_run(tmp_path), ClusterConfig(time_min=9), "test")
    assert [path.parent for path in first.base.glob("launch/*/job_id")] == [job.folder]
    new_folder(third.base)
    with pytest.raises(RunBusy):
        submit(third)


def test_the_end_of_an_earlier_submission_is_not_that_of_this_one(tmp_path: Path) -> None:
    job = _job(tmp_path)
    assert last_exit_code(job, job.tasks[0]) == EXIT_RESUME
    launch = job.tasks[0].launch
    for begun, why, code, expected in ((5.0, "failed", 1, EXIT_RESUME), (20.0, "failed", 1, 1), (30.0, "done", 0, 0)):
        write_entry(launch, Start(job="1", restart=0, nodes=(), time=begun))
        write_entry(launch, retry.End(why=why, code=code, text="", again=False, time=begun))
        assert last_exit_code(job, job.tasks[0]) == expected
    later = job.model_copy(update={"submitted": 40.0})
    assert last_exit_code(later, later.tasks[0]) == 0, "it was complete: nothing was left to do"


def test_a_command_is_one_process_on_one_node(tmp_path: Path) -> None:
    job = _job(tmp_path, nodes=4)
    assert submitit_parameters(job)["nodes"] == 1
    assert submitit_parameters(job.model_copy(update={"distributed": True}))["nodes"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP])
def test_the_batch_shell_outlives_any_signal(number: signal.Signals, tmp_path: Path) -> None:
    """Preemption by wrappers, and `scancel --batch`, signal the shell alone: it must still decide what follows."""
    programs = tmp_path / "bin"
    programs.mkdir()
    ready, ended = tmp_path / "ready", tmp_path / "ended"
    (programs / "srun").write_text(f"#!/bin/sh\ntouch {ready}\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.05; done\n")
    (programs / "python").write_text(f'#!/bin/sh\ncase "$*" in *"retry end"*) echo "$*" > {ended};; esac\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    script = batch_script(_job(tmp_path)).replace(sys.executable, str(programs / "python"))
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    shell = subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True)
    try:
        while not ready.exists():
            assert shell.poll() is None
            time.sleep(0.01)
        shell.send_signal(number)
        (tmp_path / "go").touch()
        shell.wait(30)
    finally:
        shell.kill()
    assert "retry end" in ended.read_text()
