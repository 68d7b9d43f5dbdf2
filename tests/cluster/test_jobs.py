"""`regen jobs` on a real Slurm: waiting, running, stopping, resuming on fewer nodes; the shell's Slurm variables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from regen_dist.config import to_yaml
from tests.helpers.commands import regen_here
from tests.helpers.jobs import Submitter, attempts, held, losses, told, wait_for_end, wait_until, whys
from tests.helpers.slurm import said, state, submit, wait_for
from tests.helpers.tiny import tiny_dataset, tiny_run
from tools.local_services.slurm import SlurmCluster

STEPS, SAVE_EVERY = 400, 10


class Desk:
    """A folder with a config, and a user who sits there."""

    def __init__(self, folder: Path, slurm: SlurmCluster) -> None:
        self.folder, self.slurm = folder, slurm
        self.submit = Submitter(folder, slurm.environment())

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def train(self, name: str, *more: object) -> str:
        """Submit a run on two nodes, each of them whole; the job's id."""
        arguments = ("--cluster", "loopback", "--nodes", 2, "--set", "exclusive=true", *more)
        return str(self.submit.job(self.run(name), "train", self.folder / "tiny.yaml", f"name={name}", *arguments).id())

    def jobs(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`regen jobs ARGUMENTS` to its end, in this process."""
        return regen_here("jobs", *arguments, cwd=self.folder, env=self.environment())

    def started(self, *arguments: object) -> subprocess.Popen[str]:
        """`regen jobs ARGUMENTS` in a process of its own."""
        command = [sys.executable, "-m", "tools.cli", "jobs", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.slurm.environment(), "COLUMNS": "80"}

    def row(self, name: str) -> dict[str, Any]:
        """One row of the table, for scripts."""
        return next(row for row in json.loads(self.jobs("--json").stdout)["runs"] if row["run"] == name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def desk(data: Path, tmp_path: Path, slurm: SlurmCluster) -> Desk:
    made = tiny_run(
        tmp_path / "runs", data, engine__kind="zero3", train__steps=STEPS, checkpoint__every=SAVE_EVERY,
        guards__hang__beat_s=1.0,
    )  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(to_yaml(made))
    return Desk(tmp_path, slurm)


def test_a_run_is_watched_stopped_and_resumed_on_one_node(desk: Desk) -> None:
    """While another waits for its nodes, and is never started."""
    first = desk.train("first")
    waiting = desk.train("waiting")
    with held(desk.run("first"), 2, SAVE_EVERY + 1, saved=True):
        row = desk.row("first")
        assert (row["state"], row["job"], row["nodes"], row["ranks_per_node"]) == ("running", first, 2, 1)
        assert row["step"] > SAVE_EVERY
        assert (row["steps"], row["restarts"], row["checkpoint_step"] > 0) == (STEPS, 0, True)
        assert row["loss"] == losses(desk.run("first"))[row["step"]]
        assert row["clips_per_s"] > 0
        assert row["eta_s"] > 0
        other = desk.row("waiting")
        assert other["state"] == "pending"
        assert other["note"] in ("Resources", "Priority")
        table = desk.jobs().stdout
        assert "waiting" in table
        assert all(len(line) <= 80 for line in table.splitlines())
        refused = desk.jobs("resume", "first")
        assert refused.returncode == 2
        assert f"cannot be resumed while it is running, as job {first}" in refused.stderr

        stopped = desk.jobs("stop", "waiting")
        assert "waiting: stopped" in stopped.stdout, stopped.stderr
        assert state(desk.slurm, waiting) == "CANCELLED"
        following = desk.started("logs", "first", "--follow", "--lines", 1)
        stopping = desk.started("stop", "first")
        wait_until(lambda: (desk.run("first") / "STOP").exists(), lambda: told(desk.run("first")))
        assert desk.row("first")["state"] == "stopping"
    said, err = stopping.communicate(timeout=60)
    assert stopping.returncode == 0, said + err
    assert whys(desk.run("first")) == ["stopped"]
    reached = max(losses(desk.run("first")))
    assert said == f"first: stopped; saved at step {reached} of {STEPS}; to go on: regen jobs resume first\n"
    log, err = following.communicate(timeout=60)
    assert f"stopped by the file STOP after step {reached}" in log
    assert err == "first: stopped\n"
    assert wait_for(desk.slurm, first) == "FAILED", "with code 75, and not requeued"
    assert desk.row("first")["state"] == "stopped"

    (desk.run("first") / "launch" / "config.yaml").write_text(
        (desk.run("first") / "launch" / "config.yaml").read_text().replace(f"steps: {STEPS}", f"steps: {reached + 5}")
    )
    # The ranks were held in a step, which preflight takes for slow steps: longer than the time before the job's end.
    resumed = desk.jobs("resume", "first", "--nodes", 1, "--force")
    assert resumed.returncode == 0, resumed.stderr
    assert "1 node(s) x 1 rank(s)" in resumed.stdout
    assert wait_for_end(desk.run("first"), starts=2) == "done", told(desk.run("first"))
    before, after = attempts(desk.run("first"))
    assert (len(before.start.nodes), len(after.start.nodes), after.start.step) == (2, 1, reached)
    assert sorted(losses(desk.run("first"))) == list(range(1, reached + 6))
    row = desk.row("first")
    assert (row["state"], row["restarts"], row["nodes"], row["step"]) == ("done", 1, 1, reached + 5)


def test_stopping_now_saves_nothing_and_is_no_failure(desk: Desk) -> None:
    """Ranks that hang are ended too; it goes on from the last checkpoint."""
    desk.train("now", "--nodes", 1, "engine.kind=plain")
    with held(desk.run("now"), 1, SAVE_EVERY + 3, saved=True):
        reached = max(losses(desk.run("now")))
        saved = desk.row("now")["checkpoint_step"]
        stopped = desk.jobs("stop", "now", "--now")
    assert stopped.returncode == 0, stopped.stderr
    assert f"now: stopped; saved at step {saved} of {STEPS}" in stopped.stdout
    assert saved < reached
    assert whys(desk.run("now")) == ["stopped"]
    assert desk.row("now")["state"] == "stopped"
    resumed = desk.jobs("resume", "now")
    assert resumed.returncode == 0, resumed.stderr
    wait_until(lambda: len(attempts(desk.run("now"))) == 2, lambda: told(desk.run("now")))
    assert attempts(desk.run("now"))[1].start.step == saved
    desk.jobs("stop", "now", "--now")


def test_a_command_that_knows_of_no_steps_is_told_by_a_signal(desk: Desk) -> None:
    arguments = ("run", "watcher", "--cluster", "loopback", "--", "jobs", "--watch", "1")
    job = desk.submit.job(desk.run("watcher"), *arguments)
    log = desk.run("watcher") / "logs" / "rank_0.log"
    wait_until(lambda: log.exists() and "watcher" in log.read_text(), lambda: told(desk.run("watcher")))
    stopped = desk.jobs("stop", "watcher")
    assert stopped.stdout == "watcher: stopped; to go on: regen jobs resume watcher\n", stopped.stderr
    assert whys(desk.run("watcher")) == ["stopped"]
    assert wait_for(desk.slurm, str(job.id())) == "FAILED"


# What the shell around a command says to Slurm and to ranks, on a real Slurm: none of it reaches what we start.


# A shell inside another allocation, which has settings for sbatch and ranks of its own.
SHELL = {
    "SBATCH_PARTITION": "high", "SBATCH_TIMELIMIT": "7", "SBATCH_NO_REQUEUE": "1", "SBATCH_EXPORT": "NONE",
    "SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "3", "SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_TIME_FORMAT": "relative", "SQUEUE_STATES": "SUSPENDED", "SLURM_EXPORT_ENV": "NONE",
    "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "old", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a dataset and the config of a run of two ranks."""
    folder = tmp_path_factory.mktemp("shell")
    tiny_dataset(folder / "data")
    made = tiny_run(folder / "runs", folder / "data" / "shards", engine__kind="zero3", train__steps=4)
    (folder / "tiny.yaml").write_text(to_yaml(made))
    return folder


def test_a_job_is_what_its_command_asks_for(folder: Path, slurm: SlurmCluster) -> None:
    """Partition, time limit and requeueing are those of the cluster's file; two ranks find each other, and each other
    alone; the job ends well."""
    regen_submit = Submitter(folder, {**slurm.environment(), **SHELL}, own_process=True)
    arguments = ("train", folder / "tiny.yaml", "name=asked", "--cluster", "loopback", "--nodes", 2)
    run = folder / "runs" / "asked"
    ended = regen_submit(*arguments, "--set", "memory_gb=0.5")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "SBATCH_EXPORT, SBATCH_NO_REQUEUE, SBATCH_PARTITION, SBATCH_TIMELIMIT" in ended.stdout + ended.stderr
    (number,) = {path.read_text().strip() for path in run.glob("launch/*/job_id")}
    shown = slurm.run("scontrol", "show", "job", number)
    assert "Partition=main" in shown
    assert "Requeue=1" in shown
    assert "TimeLimit=01:00:00" in shown
    assert wait_for_end(run) == "done", told(run)
    assert attempts(run)[0].start.nodes == ("node1", "node2")
    assert sorted(losses(run)) == [1, 2, 3, 4]
    assert wait_for(slurm, number) == "COMPLETED"


def test_ranks_are_started_inside_a_job_of_several_tasks(folder: Path, slurm: SlurmCluster) -> None:
    """`regen train --ranks 2` in a batch script of two tasks, with an address to meet at left over."""
    command = f"{sys.executable} -P -m tools.cli train {folder / 'tiny.yaml'} --ranks 2 name=inside"
    script = f"export MASTER_ADDR=10.255.255.1 PYTHONPATH={Path(__file__).parents[2]}\n{command}; echo code $?"
    job = submit(slurm, folder, script, "--ntasks=2", f"--export=ALL,OMP_NUM_THREADS=1,PATH={os.environ['PATH']}")
    wait_for(slurm, job, timeout_s=240.0)
    assert said(folder, job)[-1] == "code 0", said(folder, job)
    assert sorted(losses(folder / "runs" / "inside")) == [1, 2, 3, 4]
    assert (folder / "runs" / "inside" / "logs" / "rank_1.log").exists()


def test_every_task_of_a_step_starting_ranks_is_refused(folder: Path, slurm: SlurmCluster) -> None:
    command = f"{sys.executable} -P -m tools.cli train {folder / 'tiny.yaml'} --ranks 2 name=twice"
    script = f"export PYTHONPATH={Path(__file__).parents[2]}\nsrun --ntasks=2 bash -c '{command}; echo code $?'"
    job = submit(slurm, folder, script, "--ntasks=2", f"--export=ALL,PATH={os.environ['PATH']}")
    wait_for(slurm, job, timeout_s=240.0)
    lines = said(folder, job)
    assert [line for line in lines if line.startswith("code")] == ["code 2", "code 2"], lines
    assert sum("--ranks starts ranks, and this process is rank" in line for line in lines) == 2
    assert not (folder / "runs" / "twice").exists()
