"""The files of clusters and pipelines, and what a sweep makes of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from launcher.cluster import load_cluster
from launcher.pipelines.planning import plan
from launcher.pipelines.schema import load_pipeline
from launcher.submit import expand_sweep, fill_placeholders, sweep_request
from regen_dist.errors import ConfigError
from tools.cli import app

ROOT = Path(__file__).parents[3]
NANO = ROOT / "configs" / "embedder" / "nano.yaml"
CLUSTERS = sorted(path.stem for path in (ROOT / "configs" / "cluster").glob("*.yaml"))
PIPELINES = sorted((ROOT / "configs" / "pipelines").glob("*.yaml"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_is_whole(name: str) -> None:
    assert load_cluster(name).world_size >= 1


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_every_pipeline_has_a_plan(path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With all its configs, from a folder where nothing has been done yet."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    if path.stem == "paper" and cluster == "local":
        with pytest.raises(ConfigError, match="kind: local is this machine"):
            plan(load_pipeline(path), cluster, [])
        return
    planned = plan(load_pipeline(path), cluster, [])
    assert {each.state for each in planned} == {"run"}
    assert planned[0].name == "shards"


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_commands_of_every_pipeline_can_be_read(path: Path) -> None:
    """By the console command: there are such commands, with such options."""
    for step in load_pipeline(path).steps.values():
        if step.command:
            read(get_command(app), [fill_placeholders(word, 0, step.array) for word in step.command])


def read(command: Any, words: list[str]) -> None:
    """Parse words as a command does, without running it."""
    context = command.make_context("regen", list(words))
    if isinstance(command, TyperGroup):
        _, inner, rest = command.resolve_command(context, words)
        read(inner, rest)


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no cluster 'slurmm'; choose one of .*local.*slurm"):
        load_cluster("slurmm")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("nodess=2", "did you mean nodes?"),
        ("time_min=5", "leaves no time to work within 5 min"),
        ("time_min=null", "time_min is required for kind: slurm"),
        ("sbatch={output: x}", "set by the launcher"),
        ("sbatch={partition: x}", "has its own key in this file"),
        ("sbatch={ntasks_per_node: 4}", "set that key (tasks_per_node)"),
        ("sbatch={quiet: true}", "quiet: set by the launcher"),
        ("sbatch={clusters: other}", "jobs are looked for in the cluster of this machine"),
        ("environment={a-b: x}", "not a valid environment variable name"),
    ],
)
def test_what_a_cluster_cannot_be(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_cluster("slurm", [override])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("{a: {command: [x], after: [c]}, b: {command: [x]}}", "there is no step 'c'; Allowed: b"),
        ("{a: {command: [x], after: [bb]}, bbb: {command: [x]}}", "did you mean bbb?"),
        ("{a: {command: [x], after: [b]}, b: {command: [x]}}", "these steps wait for each other: "),
        ("{a: {command: [x], outputs: ['http://x/y']}}", "http:// is read only"),
        ("{a: {command: [x], outputs: ['ftp://x/y']}}", "is not supported"),
        ("{a: {train: y.yaml, outputs: [z]}}", "inputs and outputs are a command's"),
        ("{a: {command: [x], train: y.yaml}}", "give either train"),
        ("{a: {}}", "give either train"),
        ("{a: {train: y.yaml, array: 2}}", "a training is one task"),
        ("{a: {command: [x], overrides: [b=c]}}", "overrides change the config of a training"),
        ("{a: {command: [x], nodes: 2}}", "steps.a.nodes: unknown key"),
        ("{}", "steps: found {}"),
    ],
)
def test_what_a_pipeline_cannot_be(steps: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"name: p\nsteps: {steps}\n")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    assert expected in str(caught.value)


def test_two_steps_in_one_folder_are_told_with_what_else_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        f"name: p\nsteps:\n  a: {{train: {NANO}}}\n  b: {{train: {NANO}}}\n"
        f"  c: {{train: {NANO}, overrides: [train.stepz=1]}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        plan(load_pipeline(path), "local", [])
    assert "steps a and b have one folder" in str(caught.value)
    assert "did you mean train.steps?" in str(caught.value)


def test_a_sweep_gives_every_combination_a_name() -> None:
    runs = expand_sweep(NANO, ["train.steps=9"], ["optimizer.lr=1e-3,3e-3", "data.size=[32, 32],[64, 96]"])
    assert [run.name for run, _ in runs] == [
        f"nano-lr{lr}-size{size}" for lr in ("1e-3", "3e-3") for size in ("32_32", "64_96")
    ]
    assert [(run.optimizer.lr, run.data.size) for run, _ in runs] == [
        (lr, size) for lr in (1e-3, 3e-3) for size in ((32, 32), (64, 96))
    ]
    assert {run.train.steps for run, _ in runs} == {9}
    order = sweep_request(runs, load_cluster("local"), "local")
    assert (order.name, order.base.name, len(order.tasks)) == ("nano-sweep", "nano-sweep", 4)


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("optimizer.lr", "write a.b=value,value"),
        ("optimizer.lr=1e-3", "found 1 value(s)"),
        ("optimizer.lr=1e-3,[", "not valid YAML"),
        ("name=a/b,a*b", "would be named nano-namea_b"),
        ("train.stepz=1,2", "did you mean train.steps?"),
    ],
)
def test_what_is_no_sweep(sweep: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand_sweep(NANO, [], [sweep])
    assert expected in str(caught.value)
