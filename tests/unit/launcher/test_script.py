"""The batch script: what it asks for, and that nothing in it means anything to a shell but what is ours."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cluster import ClusterConfig, load_cluster
from launcher.job import LAUNCH, Submission
from launcher.script import batch_script, submitit_parameters
from launcher.submit import command_request, train_request
from regen_dist.config import load_config
from regen_dist.errors import ConfigError

HOME = Path("/fsx/you/regen")
GOLDEN = Path(__file__).parent / "golden" / "64x8.sh"
ODD = 'it\'s "odd" $(touch pwned) `x` & ; * #'


def place(job: Submission, home: Path) -> Submission:
    """The job as if it had been submitted from `home`."""
    return job.model_copy(update={"workdir": home})


def large(root: Path) -> Submission:
    """64 nodes with 8 GPUs each, on the cluster of configs/cluster/aws_parallelcluster.yaml."""
    overrides = [f"output={HOME}/runs", "train.batch_global=512", "train.accumulation=1"]
    config = load_config(root / "configs/embedder/regen_k32.yaml", overrides)
    order = train_request(config, load_cluster("aws_parallelcluster", ["nodes=64"]), "aws_parallelcluster")
    base = order.base / LAUNCH
    return place(order.job(base / "20260131-120000", base / "code" / "0123456789ab"), HOME)


def test_64_nodes_with_8_gpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole script is kept, and quoted by docs/slurm.md. After a change on purpose take what this prints."""
    monkeypatch.setattr(sys, "executable", f"{HOME}/.venv/bin/python")
    script = batch_script(large(root))
    assert script == GOLDEN.read_text(), script
    assert GOLDEN.read_text().strip() in (root / "docs" / "slurm.md").read_text()


def odd_job(**changes: object) -> Submission:
    cluster = ClusterConfig.model_validate({"time_min": 60, "environment": {"ODD": ODD}, **changes})
    order = command_request("odd", Path("/tmp") / ODD, ["shards", "verify", ODD], cluster, "mine")
    return place(order.job(order.base / LAUNCH / ODD, order.base / "code"), Path("/tmp") / ODD)


def test_what_is_quoted_comes_out_as_it_was(tmp_path: Path) -> None:
    """A shell that reads the lines before the ranks sees the odd name as one word, and runs nothing of it."""
    script = batch_script(odd_job())
    before = script.partition("# setup")[2].partition("# command")[0]
    exports = "\n".join(line for line in before.splitlines() if line.startswith("export"))
    told = subprocess.run(
        ["bash", "-c", f'{exports}\nprintf "%s\\n" "$ODD" "$PYTHONPATH"'], cwd=tmp_path, env={}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert told.stdout.splitlines() == [ODD, f"/tmp/{ODD}/code"]
    (begin,) = [line for line in before.splitlines() if " begin " in line]
    assert shlex.split(begin.removesuffix("; decision=$?"))[-2:] == ["begin", f"/tmp/{ODD}/launch/{ODD}"]
    assert not list(tmp_path.iterdir())
    assert ODD not in re.sub(r"'[^']*'|\"'\"", "", script), "it stands in quotes wherever it stands"


def test_commands_are_not_in_the_script() -> None:
    """They travel as lists, in the job's file."""
    assert "verify" not in batch_script(odd_job())
    assert odd_job().tasks[0].command == ("shards", "verify", ODD)


@pytest.mark.parametrize("character", ["%", "\\", "\n"])
def test_a_path_in_which_slurm_reads_something_is_refused(character: str) -> None:
    job = odd_job().model_copy(update={"folder": Path(f"/tmp/a{character}b")})
    with pytest.raises(ConfigError, match="choose another output folder"):
        batch_script(job)


def test_options_of_the_cluster_reach_sbatch() -> None:
    job = odd_job(
        partition="p", account="a", qos="q", constraint="c", exclude=["n1", "n2"], nodelist=["n3"], exclusive=True,
        memory_gb=1.5, gpu_type="h100", gpus_per_node=4, cpus_per_task=3, srun=["--mpi=none"],
        sbatch={"comment": ODD, "hint": "nomultithread", "overcommit": True, "oversubscribe": False},
    )  # fmt: skip
    lines = batch_script(job, "afterok:7").splitlines()
    wanted = """--partition=p --account=a --qos=q --constraint=c --exclude=n1,n2 --nodelist=n3 --exclusive --mem=1536M
        --gpus-per-node=h100:4 --cpus-per-task=3 --hint=nomultithread --overcommit --requeue --dependency=afterok:7
        --kill-on-invalid-dep=yes --time=60 --signal=USR2@300"""
    assert {f"#SBATCH {each}" for each in wanted.split()} <= set(lines)
    assert f"#SBATCH --comment={shlex.quote(ODD)}" in lines
    assert not any("oversubscribe" in line for line in lines)
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert "--kill-on-bad-exit=1 --export=ALL --cpus-per-task=3 --mpi=none" in srun


def test_an_array_is_one_script() -> None:
    order = command_request(
        "many", Path("/tmp/many"), ["a", "{task}/{tasks}"], ClusterConfig(time_min=9), "mine", tasks=3
    )
    job = order.job(order.base / LAUNCH / "D", order.base / "code")
    assert "#SBATCH --array=0-2%3" in batch_script(job)
    assert [task.command for task in job.tasks] == [("a", f"{number}/3") for number in range(3)]
    assert len({task.folder for task in job.tasks}) == 3
    assert submitit_parameters(job)["ntasks_per_node"] == 1
