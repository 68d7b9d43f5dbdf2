"""The rank variables and the Slurm options of the shell, which have no say in what the launcher starts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import typer

from launcher import local_executor, slurm
from launcher.cluster import ClusterConfig
from launcher.preflight.findings import Subject
from launcher.preflight.scheduler import scheduler
from launcher.script import batch_script, slurm_executor, slurm_tasks
from launcher.slurm import refusal
from launcher.submit import command_request
from launcher.supervise import launch
from launcher.task import _rank_variables, child_environment, meeting_address
from regen_dist.distributed.environment import RankInfo, read_rank_info, starts_ranks, without_ranks
from regen_dist.errors import ConfigError
from regen_dist.programs import GPUS_PER_NODE, STOP_CHECKED
from tools import generate, stages, train
from tools.bench.common import run_side_by_side

MEETING = {"MASTER_ADDR": "10.9.9.9", "MASTER_PORT": "1"}
RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
TORCHRUN = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "old", "GROUP_RANK": "3"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", "PMIX_RANK": "1", "MV2_COMM_WORLD_RANK": "1", "PMI_SIZE": "2"}
TASK = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
}
SUBMITIT = {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "1"}
LEFT_OVER = {**MEETING, **RANK, **TORCHRUN, **MPI, **TASK, **SUBMITIT}
SBATCH = {"SBATCH_PARTITION": "other", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_QOS": "low"}
OTHER_JOB = {
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_TIME_FORMAT": "relative",
}
OTHER_JOB |= {
    "SLURM_EXPORT_ENV": "NONE",
    "SRUN_CPUS_PER_TASK": "9",
    "SQUEUE_STATES": "PENDING",
    "SCANCEL_INTERACTIVE": "1",
}


@pytest.fixture
def left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)


def written(path: Path) -> str:
    """A program that writes its environment down, in a file of its rank's."""
    return f"import json, os; open('{path}-' + os.environ.get('RANK', 'none'), 'w').write(json.dumps(dict(os.environ)))"


@pytest.mark.usefixtures("left_over")
def test_ranks_hear_of_their_place_from_the_launcher_alone(tmp_path: Path) -> None:
    assert launch([sys.executable, "-c", written(tmp_path / "told")], ranks=2, logs=tmp_path / "logs") == 0
    for rank in range(2):
        told = json.loads((tmp_path / f"told-{rank}").read_text())
        assert read_rank_info(told) == RankInfo(rank, 2, rank)
        assert told["MASTER_ADDR"] == "127.0.0.1"
        assert told["MASTER_PORT"] != "1"
        assert not {*told} & {*TORCHRUN, *MPI, *TASK, *SUBMITIT}


@pytest.mark.usefixtures("left_over")
def test_commands_that_show_or_compare_hand_no_ranks_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Demo and miniature run commands by `stages`, benches by `arms` too."""
    program = [sys.executable, "-c", written(tmp_path / "told")]
    monkeypatch.setattr(stages, "regen", lambda *arguments: program)
    for start in (
        lambda: stages.run(["generate"]),
        lambda: stages.run_until(["train"], tmp_path, None),
        lambda: stages.run_until(["train"], tmp_path, None, {**os.environ, "MORE": "1"}),
        lambda: run_side_by_side({"one": program}, logs=tmp_path / "logs", at_once=1),
    ):
        start()
        told = json.loads((tmp_path / "told-none").read_text())
        assert not {*told} & {*LEFT_OVER}
        (tmp_path / "told-none").unlink()


def _job(tmp_path: Path, tasks: int = 1, **cluster: Any) -> Any:
    place = ClusterConfig.model_validate({"time_min": 9, "partition": "mine", **cluster})
    order = command_request("job", tmp_path / "job", ["shards", "verify", "{task}"], place, "test", tasks=tasks)
    return order.job(tmp_path / "job" / "launch" / "D", tmp_path / "code")


@pytest.mark.usefixtures("left_over")
def test_a_job_on_this_machine_is_told_nothing_of_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SBATCH, **OTHER_JOB}.items():
        monkeypatch.setenv(name, value)
    told = local_executor._environment(_job(tmp_path, kind="local", environment={"MINE": "1"}))
    assert not {*told} & {*LEFT_OVER, *SBATCH, *OTHER_JOB}
    assert told["MINE"] == told["PYTHONSAFEPATH"] == "1"
    assert not {*child_environment(_job(tmp_path))} & {*LEFT_OVER}


def test_a_rank_of_a_slurm_job_is_what_slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the shell that submitted it, or a module that its nodes load, has left other variables."""
    for name, value in {**LEFT_OVER, "RANK": "0", "WORLD_SIZE": "9"}.items():
        monkeypatch.setenv(name, value)
    job = _job(tmp_path)
    told = child_environment(job) | _rank_variables(job, "node1", "12", 0)
    assert read_rank_info(told) == RankInfo(1, 2, 1)
    assert told["MASTER_ADDR"] == "node1"


def test_a_node_whose_name_no_host_has_is_met_at_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """`NodeName` need not be the name of a host."""
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.7")
    assert meeting_address("localhost") == "localhost"
    assert meeting_address("no such host") == "10.0.0.7"


def test_a_job_is_told_how_many_gpus_it_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not how many another job did, inside which it was submitted."""
    monkeypatch.setenv(GPUS_PER_NODE, "4")
    assert child_environment(_job(tmp_path, gpus_per_node=8))[GPUS_PER_NODE] == "8"
    assert child_environment(_job(tmp_path))[GPUS_PER_NODE] == "0"
    assert STOP_CHECKED not in child_environment(_job(tmp_path)), "a command that trains has a folder of its own"


def test_a_cluster_cannot_set_the_variables_of_ranks() -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR, RANK: set by the launcher"):
        ClusterConfig.model_validate({"time_min": 9, "environment": {"RANK": "1", "MASTER_ADDR": "x", "FINE": "1"}})


@pytest.mark.parametrize(
    "environment",
    [
        {},
        MEETING,
        {"RANK": "0"},
        {"RANK": "3", **MEETING},
        {"WORLD_SIZE": "8"},
        {"RANK": "0", "WORLD_SIZE": "1", **MEETING},
        {"RANK": "1", "WORLD_SIZE": "2"},  # nowhere to meet: nobody's ranks
        {"RANK": "9", "WORLD_SIZE": "2", **MEETING},
        {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": "0",
            **MEETING,
        },  # a batch script of #SBATCH --ntasks=2
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {**TORCHRUN, **MPI, **SUBMITIT},
    ],
)
def test_ranks_that_were_asked_for_are_started(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("launcher.supervise.train_locally", lambda *_, ranks, fresh: asked.append(ranks) or 0)
    for name in {*LEFT_OVER, *environment}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(typer.Exit):
        train.train(Path("tiny.yaml"), ranks=2)
    assert asked == [2]


@pytest.mark.parametrize("environment", [{**RANK, **MEETING}, {**RANK, **MEETING, **TORCHRUN}, TASK])
def test_ranks_are_not_started_by_each_of_several_ranks(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"rank 1 of 2.* already .*Leave out --ranks.*unset "):
        starts_ranks(environment, asked=True)


def test_a_rank_of_somebody_else_is_that_rank() -> None:
    assert not starts_ranks({**RANK, **MEETING}, asked=False)
    assert not starts_ranks({**TASK, **MEETING}, asked=False)
    for alone in ({}, MEETING, {"RANK": "1"}, {"WORLD_SIZE": "2", **MEETING}, TASK):
        assert starts_ranks(alone, asked=False)


def test_torchrun_in_one_task_of_each_node_is_not_asked_which_rank_it_is() -> None:
    nodes = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    own = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "1"}
    assert read_rank_info({**nodes, **own, **MEETING}) == RankInfo(9, 16, 1)


def test_what_is_no_rank_is_kept() -> None:
    kept = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": "0"}
    assert without_ranks({**kept, **LEFT_OVER}) == kept


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's programs, which write down what they are told, where a shell has wishes for them."""
    programs, told = tmp_path / "bin", tmp_path / "told.json"
    programs.mkdir()
    code = f"import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open({str(told)!r}, 'w'))"
    for name in ("sbatch", "squeue", "scontrol", "scancel", "sinfo"):
        said = "; print('Submitted batch job 12')" if name == "sbatch" else ""
        (programs / name).write_text(f"#!{sys.executable}\n{code}{said}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in {**LEFT_OVER, **SBATCH, **OTHER_JOB, "SLURM_CONF": "/etc/there", "PYTHONPATH": ":/mine"}.items():
        monkeypatch.setenv(name, value)
    return told


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("how", ["submit", "preflight"])
def test_sbatch_is_told_by_arguments_what_the_job_asks_for(how: str, tasks: int, asked: Path, tmp_path: Path) -> None:
    job = _job(tmp_path, tasks)
    if how == "submit":
        before = dict(os.environ)
        assert slurm_executor(job).submit_all(slurm_tasks(job)) == "12"
        assert dict(os.environ) == before
        pickles = sorted(path.name for path in (job.folder / "submitit").glob("*_submitted.pkl"))
        assert pickles == (["12_submitted.pkl"] if tasks == 1 else [f"12_{n}_submitted.pkl" for n in range(3)])
    else:
        assert refusal(batch_script(job)) == ""
    arguments, environment = json.loads(asked.read_text())
    assert {"--partition=mine", "--time=9", "--requeue", "--nodes=1"} <= {*arguments}
    assert ("--array=0-2%3" in arguments) == (tasks == 3)
    assert not {*environment} & {*LEFT_OVER, *SBATCH, *OTHER_JOB}
    assert environment["SLURM_CONF"] == "/etc/there"
    assert environment["PYTHONPATH"] == "/mine"


def test_an_option_with_an_odd_value_is_one_argument() -> None:
    script = "#!/bin/bash\n#SBATCH --comment='a \"b\" $(c)'\n#SBATCH --requeue\necho '#SBATCH --no'\n"
    assert slurm.options(script) == ['--comment=a "b" $(c)', "--requeue"]


def test_questions_about_jobs_are_asked_without_the_wishes_of_the_shell(asked: Path) -> None:
    for question in (lambda: slurm.queue(["7"]), lambda: slurm.cancel("7"), lambda: slurm.show_job("7")):
        question()
        _, environment = json.loads(asked.read_text())
        assert not {*environment} & {*SBATCH, *OTHER_JOB}
        assert environment["SLURM_CONF"] == "/etc/there"


@pytest.mark.usefixtures("asked")
def test_options_that_do_not_reach_the_job_are_named(tmp_path: Path) -> None:
    place = ClusterConfig(time_min=9)
    order = command_request("job", tmp_path / "job", ["shards", "verify", "x"], place, "test")
    first = next(iter(scheduler(Subject(order))))
    assert "SBATCH_NO_REQUEUE, SBATCH_PARTITION, SBATCH_QOS, SBATCH_TIMELIMIT" in first.text
    assert not first.forbids


def test_srun_hands_the_exports_of_the_script_on(tmp_path: Path) -> None:
    (line,) = [each for each in batch_script(_job(tmp_path)).splitlines() if each.startswith("srun")]
    assert "--export=ALL" in line


def test_the_environment_of_a_generate_task_is_its_task_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--task` and left-over ranks: the task counts, and its device is the first that it sees."""
    for name, value in {**RANK, **TASK, **MEETING, "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    load = Mock(side_effect=InterruptedError)
    monkeypatch.setattr("regen_dist.inference.sampler.TextToVideoModel.load", load)
    with pytest.raises(InterruptedError):
        generate.generate(Path("r"), Path("e"), ["a", "b", "c", "d"], task="1/4")
    assert capsys.readouterr().out.splitlines()[0] == "task 1/4: 1 of 4 prompts"
    assert load.call_args.args[2].index in (None, 0)
