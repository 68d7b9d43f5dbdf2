"""What the shell around a command says to Slurm and to ranks, on a real Slurm: none of it reaches what we start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from regen_dist.config import to_yaml
from tests.helpers.launching import Submitter, attempts, losses, told, wait_for_end
from tests.helpers.slurm import said, submit, wait_for
from tests.helpers.tiny import tiny_dataset, tiny_run
from tools.local_services.slurm import SlurmCluster

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
    regen_submit = Submitter(folder, {**slurm.environment(), **SHELL})
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
