"""Jobs on a real Slurm that are not training alone: arrays with a task that fails, nodes that fail, names that a shell
would read otherwise."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from regen_dist.config import to_yaml
from tests.helpers.jobs import Submitter, attempts, held, losses, told, wait_for_end, wait_for_ends, wait_until, whys
from tests.helpers.slurm import wait_for
from tests.helpers.tiny import tiny_dataset, tiny_run
from tests.helpers.video import moving_square, write_video
from tools.local_services.slurm import SlurmCluster

STEPS = 50
# What a shell, sbatch and Slurm's own patterns would make something of.
ODD = 'it\'s "odd" $(touch pwned) `x` & ; * #'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With a dataset, and a folder of odd name in it."""
    folder = tmp_path_factory.mktemp("jobs")
    tiny_dataset(folder / "data")
    (folder / ODD).mkdir()
    return folder


@pytest.fixture
def regen_submit(folder: Path, slurm: SlurmCluster) -> Submitter:
    return Submitter(folder, slurm.environment())


def config(folder: Path, output: Path, **changes: object) -> Path:
    """A run of one process, on data in a local folder."""
    made = tiny_run(output, folder / "data" / "shards", engine__kind="plain", **changes)
    path = output / f"{made.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(made))
    return path


def test_an_array_of_which_one_task_fails(regen_submit: Submitter, slurm: SlurmCluster, folder: Path) -> None:
    """Three tasks make shards of a video each, as pre-encoding does; one video is not there yet. The others finish,
    that one alone is started again, and succeeds once its video has come."""
    videos, base = folder / "videos", folder / "runs" / "array"
    for number in range(3):
        write_video(videos / f"{number}.mp4", moving_square(48, 48, 64, seed=number))
    (videos / "2.mp4").rename(folder / "late.mp4")
    command = ["shards", "build", f"{videos}/{{task}}.mp4", "--out", f"{folder}/built/{{task}}-of-{{tasks}}"]
    options = ["--segment-seconds", "1", "--min-frames", "20", "--workers", "0"]
    job = regen_submit.job(base, "run", "array", "--cluster", "loopback", "--array", 3, "--", *command, *options)
    assert [str(task.folder) for task in job.tasks] == [f"{base}/tasks/{number:05d}" for number in range(3)]
    late = job.tasks[2].folder  # the last task, whose job id is the array's own
    wait_until(lambda: whys(late)[:1] == ["failed"], lambda: told(late))
    shutil.copy(folder / "late.mp4", videos / "2.mp4")
    for task in job.tasks:
        assert wait_for_end(task.folder) == "done", told(task.folder)
    assert [len(attempts(task.folder)) for task in job.tasks[:2]] == [1, 1]
    assert len(attempts(late)) >= 2
    number = job.id()
    assert number
    assert wait_for(slurm, f"{number}_2") == "COMPLETED"
    for index in range(3):
        assert (folder / "built" / f"{index}-of-3").is_dir()


def test_a_task_that_keeps_failing_is_given_up(regen_submit: Submitter, folder: Path, slurm: SlurmCluster) -> None:
    """After a second look at data that is not there, with its own exit code; a wrong config is not tried twice."""
    arguments = ("--cluster", "loopback", "--")
    gone = regen_submit.job(
        folder / "runs" / "gone", "run", "gone", *arguments, "shards", "verify", folder / "no such dataset"
    )
    assert wait_for_end(gone.tasks[0].folder) == "failed", told(gone.tasks[0].folder)
    assert whys(gone.tasks[0].folder) == ["failed", "failed"]
    last = attempts(gone.tasks[0].folder)[-1].end
    assert last is not None
    assert last.code == 3
    assert "exit code 3 came twice" in last.text
    wrong = regen_submit.job(folder / "runs" / "wrong", "run", "wrong", *arguments, "config", "show", "/dev/null")
    assert wait_for_end(wrong.tasks[0].folder) == "failed", told(wrong.tasks[0].folder)
    assert whys(wrong.tasks[0].folder) == ["failed"]
    assert wait_for(slurm, str(wrong.id())) == "FAILED"


def test_a_node_that_fails_twice_is_left_out(regen_submit: Submitter, folder: Path, slurm: SlurmCluster) -> None:
    """The rank is killed twice on the node that Slurm prefers; the third start is elsewhere."""
    run = folder / "runs" / "twice"
    path = config(folder, folder / "runs", name="twice", train__steps=STEPS, checkpoint__every=5)
    regen_submit.job(run, "train", path, "--cluster", "loopback")
    for start in (1, 2):
        with held(run, 1, 2, starts=start) as ranks:
            os.kill(ranks[0], signal.SIGKILL)
        wait_for_ends(run, start)
    assert wait_for_end(run, starts=3) == "done", told(run)
    nodes = [each.start.nodes[0] for each in attempts(run)]
    assert nodes == [nodes[0], nodes[0], {"node1": "node2", "node2": "node1"}[nodes[0]]]
    assert "excluded from now on" in told(run)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))


def test_a_node_that_loses_power(regen_submit: Submitter, folder: Path, slurm: SlurmCluster) -> None:
    """Nobody says a last word: Slurm finds out, and the next start notes which node it was."""
    run = folder / "runs" / "power"
    path = config(folder, folder / "runs", name="power", train__steps=STEPS, checkpoint__every=5)
    regen_submit.job(run, "train", path, "--cluster", "loopback")
    with held(run, 1, 6, saved=True):
        lost = attempts(run)[0].start.nodes[0]
        slurm.end_node(lost)
    try:
        assert wait_for_end(run, starts=2) == "done", told(run)
        first, second = attempts(run)
        assert first.end is not None
        assert (first.end.why, first.end.at_fault) == ("node lost", (lost,))
        assert second.start.nodes != (lost,)
        assert second.start.step is not None
        assert second.start.step >= 5
    finally:
        slurm.start_node(lost)
    wait_until(
        lambda: slurm.run("sinfo", "-hN", "-pmain", f"-n{lost}", "-o%T") == "idle",
        lambda: slurm.run("sinfo", "-hN", "-pmain", f"-n{lost}", "-o%T") + slurm.run("scontrol", "show", "node", lost),
    )


def test_whatever_is_in_a_name_is_passed_on_literally(
    regen_submit: Submitter, folder: Path, slurm: SlurmCluster
) -> None:
    """Folders, an environment variable and an override with quotes, spaces and `$(…)`: nothing is run, nothing lost."""
    place = folder / ODD
    path = config(folder, place / "runs", name="odd", train__steps=2)
    submitter = Submitter(place, slurm.environment())
    os.symlink(folder / "data" / "shards", place / "shards $(x)")
    run = place / "runs" / "odd"
    job = submitter.job(
        run, "train", path, "--cluster", "loopback", "--set", f"environment.ODD={json.dumps(ODD)}",
        f"data.url={place}/shards $(x)", f"wandb.project={json.dumps(ODD)}",
    )  # fmt: skip
    assert wait_for_end(run) == "done", told(run)
    assert job.cluster.environment["ODD"] == ODD
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["wandb"]["project"] == ODD
    assert resolved["data"]["url"] == f"{place}/shards $(x)"
    assert not list(folder.rglob("pwned")), "a name was run"


def test_a_path_in_which_slurm_reads_something_is_refused(folder: Path, regen_submit: Submitter) -> None:
    path = config(folder, folder / "100%job", name="percent")
    ended = regen_submit("train", path, "--cluster", "loopback")
    assert ended.returncode == 2
    assert "choose another output folder" in ended.stderr


def test_a_sweep_is_one_array_with_a_run_for_each_value(
    regen_submit: Submitter, slurm: SlurmCluster, folder: Path
) -> None:
    path = config(folder, folder / "sweep", name="swept", train__steps=2)
    job = regen_submit.job(
        folder / "sweep" / "swept-sweep", "train", path, "--cluster", "loopback", "--sweep", "optimizer.lr=1e-3,3e-3"
    )
    runs = [folder / "sweep" / name for name in ("swept-lr1e-3", "swept-lr3e-3")]
    assert [task.folder for task in job.tasks] == runs
    for run in runs:
        assert wait_for_end(run) == "done", told(run)
    lines = slurm.run("squeue", "-h", "-a", "--array", "--states=all", f"--jobs={job.id()}", "-o%i").split()
    assert sorted(lines) == [f"{job.id()}_0", f"{job.id()}_1"]
    assert losses(runs[0])[1] == losses(runs[1])[1], "before the first update nothing differs"
    assert losses(runs[0])[2] != losses(runs[1])[2]
