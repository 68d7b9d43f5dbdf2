"""Stopping and resuming, with real jobs on this machine: a command that lasts, and one that fails at first."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import local_executor, slurm
from launcher.attempts import read_history
from launcher.cluster import ClusterConfig
from launcher.job import ID_FILE, Submission, newest_job
from launcher.jobs import find
from launcher.jobs import stop as stopping
from launcher.jobs.find import Member, choose_job
from launcher.jobs.stop import changed_cluster, incomplete_tasks, rebuild_request, resubmit, stop
from launcher.jobs.table import list_jobs
from launcher.retry import decide_start
from launcher.submit import command_request, submit, wait_for
from regen_dist.config import to_yaml
from regen_dist.errors import ConfigError, RegenError
from tests.helpers.jobs import LOCAL, SUBMITTED, array_tasks, committed, ended, made_job, started, wait_until, whys
from tests.helpers.tiny import tiny_run


class Here:
    """Jobs on this machine, by the API that the command line calls."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "runs"
        self.jobs: list[Submission] = []

    def watcher(self, name: str, **options: int) -> Submission:
        """A job of a command that does not end by itself, and does not listen to signals."""
        return self.submit(name, ["jobs", "--watch", "1", "--root", str(self.root)], **options)

    def submit(self, name: str, command: list[str], *, tasks: int = 1, parallel: int = 1) -> Submission:
        cluster = ClusterConfig(kind="local", array_parallelism=parallel)
        job = submit(command_request(name, self.root / name, command, cluster, "local", tasks=tasks))
        self.jobs.append(job)
        return job


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Here]:
    local = Here(tmp_path)
    local.root.mkdir()
    yield local
    for job in local.jobs:
        stop(choose_job(str(job.folder.parents[1]), local.root), local.root, at_once=True, wait=True)


def is_printing(job: Submission, index: int = 0) -> bool:
    log = job.tasks[index].logs / "rank_0.log"
    return log.is_file() and "running" in log.read_text()


def processes_of(folder: Path) -> list[str]:
    """The command lines that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [each for each in found if str(folder) in each]


def test_a_command_is_stopped_for_good(local: Here, capsys: pytest.CaptureFixture[str]) -> None:
    job = local.watcher("w")
    wait_until(lambda: is_printing(job), lambda: (job.folder / local_executor.LOG).read_text())
    with pytest.raises(ConfigError, match=r"w: cannot be resumed while it is running, as job \d+; `regen jobs stop w`"):
        incomplete_tasks(choose_job("w", local.root), local.root)
    assert stop(choose_job("w", local.root), local.root, at_once=False, wait=True)
    assert whys(job.tasks[0].folder) == ["stopped"]
    assert capsys.readouterr().out == "w: stopped; to go on: regen jobs resume w\n"
    wait_until(lambda: not processes_of(local.root), lambda: processes_of(local.root))


def test_a_job_whose_process_is_killed_ends(local: Here) -> None:
    """Its processes end with it, since nothing else would stop them, and it shows as lost."""
    job = local.watcher("w")
    wait_until(lambda: is_printing(job), lambda: (job.folder / local_executor.LOG).read_text())
    os.kill(int(job.id() or 0), signal.SIGKILL)
    wait_until(lambda: not processes_of(local.root), lambda: processes_of(local.root))
    ((row,), problems) = list_jobs(local.root)
    assert (row.run, row.state, problems) == ("w", "lost", [])


def test_tasks_of_an_array_are_stopped_alone_and_the_rest_at_once(
    local: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    """Now kills every process, and leaves word, so that the next start does not take it for a failure."""
    job = local.watcher("w", tasks=3, parallel=2)
    wait_until(lambda: is_printing(job) and is_printing(job, 1), lambda: (job.folder / local_executor.LOG).read_text())
    assert stop(choose_job("w/2", local.root), local.root, at_once=False, wait=True)
    assert capsys.readouterr().out == "w/2: stopping (it does not begin)\n"
    with pytest.raises(ConfigError, match="w/2: cannot be resumed while it is stopping"):
        incomplete_tasks(choose_job("w/2", local.root), local.root)
    assert stop(choose_job("w/0", local.root), local.root, at_once=False, wait=True)
    assert whys(job.tasks[0].folder) == ["stopped"]
    assert whys(job.tasks[1].folder) == [""]
    assert stop(choose_job("w", local.root), local.root, at_once=True, wait=True)
    wait_until(lambda: not processes_of(local.root), lambda: processes_of(local.root), timeout_s=60)
    (attempt,) = read_history(job.tasks[1].launch)
    assert attempt.end is not None
    assert (attempt.end.why, attempt.end.code, attempt.end.again) == ("stopped", 137, False)
    assert whys(job.tasks[0].folder) == ["stopped"]
    assert not (job.tasks[2].folder / "launch").exists()


def test_a_process_of_an_earlier_submission_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another program's by now: the machine was started anew before the array was resumed."""
    base, killed = tmp_path / "a", list[int]()
    tasks = array_tasks(base, 2)
    job = made_job(base, tasks, steps=None, cluster=LOCAL, job_id="4000")
    for task in tasks:
        started(task, at=SUBMITTED - 100, job="4001")  # cut off by the power: without an end
    started(tasks[0], job="4002")
    monkeypatch.setattr(local_executor, "is_running_locally", lambda job: True)
    monkeypatch.setattr(stopping.os, "kill", lambda process, number: killed.append(process))
    for at_once in (True, False):
        stop([Member(job, 1)], tmp_path, at_once=at_once, wait=False)
    assert not killed


def test_a_task_that_is_being_started_is_stopped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, sent = local_executor._Tasks(made_job(tmp_path / "a", steps=None, cluster=LOCAL)), list[int]()
    process = SimpleNamespace(returncode=None, send_signal=sent.append, wait=lambda: None)

    def submit_slowly(_task: object) -> SimpleNamespace:
        tasks.stop(signal.SIGTERM, None)
        return SimpleNamespace(_process=process)

    monkeypatch.setattr(tasks, "_executor", SimpleNamespace(submit=submit_slowly))
    tasks.run()
    assert sent == [signal.SIGTERM]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_job_of_another_machine_is_not_signalled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """The folder is shared, the numbers of processes are not: a training reads the file STOP, all else is refused."""
    killed = list[int]()
    job = made_job(tmp_path / "a", steps=None if at_once else 100, cluster=LOCAL, job_id="4000")
    started(job.tasks[0])
    monkeypatch.setattr(find.socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(stopping.os, "kill", lambda process, number: killed.append(process))
    members = [Member(job, 0)]
    if at_once:
        with pytest.raises(RegenError, match=r"a: runs on .*; give the command there"):
            stop(members, tmp_path, at_once=True, wait=False)
    else:
        stop(members, tmp_path, at_once=False, wait=False)
        assert job.tasks[0].stop_file.exists()
    assert not killed


def test_the_task_that_failed_alone_is_resumed(local: Here) -> None:
    """With the code that it was submitted with, in the array's folder; then nothing is left to do."""
    (local.root / "0.yaml").write_text(to_yaml(tiny_run()))
    command = ["config", "show", f"{local.root}/{{task}}.yaml"]
    job = local.submit("a", command, tasks=2, parallel=2)
    assert wait_for(job) != 0
    (local.root / "1.yaml").write_text(to_yaml(tiny_run()))
    before, order = rebuild_request(incomplete_tasks(choose_job("a", local.root), local.root), None, [])
    again = resubmit(before, order)
    assert again.tasks == job.tasks[1:2]
    assert again.code == job.code
    assert wait_for(again) == 0
    assert [whys(task.folder) for task in job.tasks] == [["done"], ["failed", "done"]]
    with pytest.raises(ConfigError, match="a: nothing is left to do"):
        incomplete_tasks(choose_job("a", local.root), local.root)


def test_a_job_of_this_machine_on_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre mounted without flock: it starts, and its process shows that it runs."""

    def flock(file: object, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    job = made_job(tmp_path / "a", cluster=LOCAL)
    with (
        local_executor._locked(job.folder),
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(job.folder)]) as process,
    ):
        (job.folder / ID_FILE).write_text(f"{process.pid}\n")
        assert local_executor.is_running_locally(job)
        process.kill()
    assert not local_executor.is_running_locally(job)
    (job.folder / ID_FILE).write_text(f"{os.getpid()}\n")
    assert not local_executor.is_running_locally(job), "another program's process"


def test_a_complete_training_is_not_resumed(tmp_path: Path) -> None:
    job = made_job(tmp_path / "a", steps=100, cluster=LOCAL)
    started(job.tasks[0])
    ended(job.tasks[0], "stopped")
    committed(tmp_path / "a", 90, at=time.time())
    assert len(incomplete_tasks(choose_job("a", tmp_path), tmp_path)) == 1
    committed(tmp_path / "a", 100, at=time.time())
    with pytest.raises(ConfigError, match="a: nothing is left to do, all is complete; for more steps submit it again"):
        incomplete_tasks(choose_job("a", tmp_path), tmp_path)


def test_steps_of_a_pipeline_are_not_resumed_beside_each_other(tmp_path: Path) -> None:
    for name in ("shards", "train"):
        made_job(tmp_path / "paper" / name, cluster=LOCAL)
    with pytest.raises(ConfigError, match=r"shards, train: .*`regen submit pipeline` again"):
        rebuild_request(choose_job("paper", tmp_path), None, [])


def test_tries_before_a_resume_do_not_count(tmp_path: Path) -> None:
    """A job that was given up begins again: a person has looked at it."""
    job = made_job(tmp_path / "a", steps=None, cluster=LOCAL)
    for number in range(job.cluster.retry.starts_without_progress):
        started(job.tasks[0], at=SUBMITTED + number)
        ended(job.tasks[0], "failed", at=SUBMITTED + number)
    history = read_history(job.tasks[0].launch)
    asked = {"step": 0, "steps": 9, "stop": False, "retry": job.cluster.retry}
    assert not decide_start(history, since=job.submitted, **asked).go
    assert decide_start(history, since=SUBMITTED + 100, **asked).go


def test_what_slurm_does_not_tell_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may run; --force takes it for ended."""
    monkeypatch.setenv("PATH", str(tmp_path))
    job = made_job(tmp_path / "a", array_tasks(tmp_path / "a", 1), steps=None)
    started(job.tasks[0])
    with pytest.raises(RegenError, match="squeue not found"):
        incomplete_tasks(choose_job("a", tmp_path), tmp_path)
    assert len(incomplete_tasks(choose_job("a", tmp_path), tmp_path, force=True)) == 1


def test_another_place_and_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overrides are laid over what it was submitted with, and named where they are wrong."""
    run = tmp_path / "a"
    job = made_job(run, steps=8)
    (run / "launch" / "config.yaml").write_text(to_yaml(tiny_run(tmp_path)))
    members = choose_job("a", tmp_path)
    _, same = rebuild_request(members, None, [])
    assert (same.cluster, same.cluster_name, same.base, same.tasks) == (job.cluster, "slurm", run, job.tasks)
    assert [config.name for config in same.configs] == ["tiny"]
    _, fewer = rebuild_request(members, None, ["nodes=1"])
    assert fewer.cluster == job.cluster.model_copy(update={"nodes": 1})
    odd = job.cluster.model_copy(update={"account": "0891", "environment": {"MPI": "none"}})  # words to YAML's eyes
    assert changed_cluster(job.model_copy(update={"cluster": odd}), None, ["nodes=1"])[0].account == "0891"
    _, moved = rebuild_request(members, "local", [])
    assert (moved.cluster.kind, moved.cluster_name) == ("local", "local")
    with pytest.raises(ConfigError, match=r"the cluster of a: 1 problem\n  command line: nodez: .* nodes\?"):
        rebuild_request(members, None, ["nodez=1"])

    handed: list[Submission] = []
    monkeypatch.setattr("launcher.jobs.stop.submit_to_slurm", lambda job: handed.append(job) or job)
    assert resubmit(job, fewer).code == job.code
    _, fewer = rebuild_request(members, None, ["nodes=1"])
    fresh = resubmit(job, fewer, new_code=True)
    assert fresh.code != job.code
    assert (fresh.code / "launcher" / "jobs").is_dir()
    assert (fresh.workdir, fresh.kind, fresh.cluster.nodes) == (job.workdir, "train", 1)
    os.rmdir(job.code)
    with pytest.raises(RegenError, match="the code snapshot is gone; --new-code"):
        resubmit(job, fewer)


def test_a_job_that_waits_in_slurm_is_cancelled_and_begins_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only while it waits: one that has started meanwhile saves, since it sees the file."""
    state = {"12": ("PENDING", "Priority")}
    calls = []

    def ask(*command: str) -> str:
        calls.append(command)
        state["12"] = ("CANCELLED", "None")
        return ""

    monkeypatch.setattr(slurm, "queue", lambda _jobs: dict(state))
    monkeypatch.setattr(slurm, "run_program", ask)
    monkeypatch.setattr("launcher.jobs.stop._ASK_EVERY_S", 0.0)
    job = made_job(tmp_path / "a")
    assert stop(choose_job("a", tmp_path), tmp_path, at_once=False, wait=True)
    assert calls == [("scancel", "--state=PENDING", "12")]
    assert job.tasks[0].stop_file.exists()
    assert capsys.readouterr().out == "a: stopped; nothing is saved; to go on: regen jobs resume a\n"
    assert newest_job(tmp_path / "a") == job


def test_a_file_that_a_starting_rank_deletes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = made_job(tmp_path / "a")
    task = job.tasks[0]
    started(task)
    looks = []

    def queue(_jobs: list[str]) -> dict[str, tuple[str, str]]:
        looks.append(task.stop_file.exists())
        if len(looks) == 2:
            task.stop_file.unlink()
        if len(looks) == 4:
            ended(task, "stopped")
        return {"12": ("RUNNING", "None")}

    monkeypatch.setattr(slurm, "queue", queue)
    monkeypatch.setattr("launcher.jobs.stop._ASK_EVERY_S", 0.0)
    assert stop(choose_job("a", tmp_path), tmp_path, at_once=False, wait=True)
    assert looks == [False, True, True, True]
    assert task.stop_file.exists()


def test_what_has_ended_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = made_job(tmp_path / "a")
    started(job.tasks[0])
    ended(job.tasks[0], "failed", text="exit code 3")
    assert not stop(choose_job("a", tmp_path), tmp_path, at_once=False, wait=True)
    assert capsys.readouterr().out.startswith("a: has ended before: failed (exit code 3)")
    assert not job.tasks[0].stop_file.exists()
