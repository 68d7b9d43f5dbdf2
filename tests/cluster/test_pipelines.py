"""A pipeline on a real Slurm with a real store: from video files to measured reconstructions, skipped when complete."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from launcher.job import Submission, newest_job
from launcher.pipelines.schema import exists
from regen_dist.config import to_yaml
from tests.helpers.jobs import Submitter, attempts, has_been_told, held, told, wait_for_end, wait_until, whys
from tests.helpers.slurm import submit, wait_for
from tests.helpers.stores import use
from tests.helpers.tiny import tiny_run
from tests.helpers.video import moving_square, write_video
from tools.local_services.s3 import ObjectServer
from tools.local_services.slurm import SlurmCluster

STEPS = 30  # of the training
PIPELINE = ("shards", "embedder", "model", "evaluate")
BUILD = ("--segment-seconds", 1, "--short-side", 48, "--min-frames", 20, "--workers", 0)


class Workshop:
    """Videos, a config, and the file of a pipeline that keeps data and checkpoints in the store."""

    def __init__(self, folder: Path, store: ObjectServer) -> None:
        self.folder, self.url = folder, f"s3://{store.bucket}/pipeline-{uuid4().hex[:8]}"
        self.base, self.file = folder / "runs" / "mini", folder / "mini.yaml"
        for seed in range(2):
            write_video(folder / "videos" / f"{seed}.mp4", moving_square(48, 48, 64, seed=seed))
            write_video(folder / "test" / f"{seed}.mp4", moving_square(12, 48, 64, seed=10 + seed))
        run = tiny_run(
            folder / "runs", f"{self.url}/train", train__steps=STEPS, checkpoint__every=10,
            checkpoint__url=f"{self.url}/runs",
        )  # fmt: skip
        (folder / "tiny.yaml").write_text(to_yaml(run))
        self.file.write_text(yaml.safe_dump(self.steps(), sort_keys=False))

    def steps(self) -> dict[str, object]:
        model, out = str(self.folder / "runs" / "model"), f"{self.folder}/runs/test"
        build = ["shards", "build", f"{self.folder}/videos", "--out", f"{self.url}/train", *BUILD]
        measure = ["reconstruct", f"{self.folder}/test/{{task}}.mp4", "--run", model, "--out", f"{out}/{{task}}"]
        return {
            "name": "mini",
            "output": str(self.folder / "runs"),
            "steps": {
                "shards": {
                    "command": [*build, "--task", "{task}/{tasks}"], "array": 2,
                    "outputs": [f"{self.url}/train/manifest.json"],
                },
                "embedder": {"train": str(self.folder / "tiny.yaml")},
                "model": {
                    "command": ["checkpoint", "export", f"{self.folder}/runs/tiny", "--out", model, "--no-statistics"],
                    "outputs": [f"{model}/config.yaml"],
                },
                "evaluate": {
                    "command": measure, "array": 2, "outputs": [f"{out}/{{task}}/metrics.json"]
                },
            },
        }  # fmt: skip

    def folder_of(self, step: str) -> Path:
        return self.folder / "runs" / "tiny" if step == "embedder" else self.base / step


@pytest.fixture(scope="module")
def shop(object_store: ObjectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        use(patch, object_store.environment())
        folder = tmp_path_factory.mktemp("pipelines")
        patch.setenv("REGEN_CACHE", str(folder / "cache"))
        yield Workshop(folder, object_store)


@pytest.fixture
def regen_submit(shop: Workshop, slurm: SlurmCluster) -> Submitter:
    return Submitter(shop.folder, slurm.environment())


def newest(base: Path) -> Submission:
    job = newest_job(base)
    assert job is not None
    return job


def write_pipeline(file: Path, shop: Workshop, name: str, steps: Mapping[str, object]) -> None:
    text = yaml.safe_dump({"name": name, "output": str(shop.folder / "runs"), "steps": steps}, sort_keys=False)
    file.write_text(text)


def run_pipeline(regen_submit: Submitter, file: Path, *more: object) -> list[str]:
    """Submit a pipeline; returns the lines that were printed."""
    made = regen_submit("pipeline", file, "--cluster", "loopback", *more)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout.splitlines()


def ended(folder: Path) -> float:
    """When the newest start of a task ended."""
    end = attempts(folder)[-1].end
    assert end is not None
    return end.time


def test_a_pipeline_from_videos_to_measured_reconstructions(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster
) -> None:
    """Shards by an array, training on a node that a job of higher priority takes away on its way, an export, an array
    that measures. While it runs a second submission submits nothing; what follows waits for the training's real
    end, not for the moment of its requeue; after it everything is skipped."""
    lines = run_pipeline(regen_submit, shop.file)
    assert [line.partition(":")[0] for line in lines] == list(PIPELINE)
    assert "after shards" in lines[1]
    run = shop.folder_of("embedder")
    with held(run, 1, 3) as ranks:
        again = run_pipeline(regen_submit, shop.file)
        assert again[0] == "shards: skipped, its output is complete"
        assert all("not submitted again" in line for line in again[1:]), again
        submit(slurm, shop.folder, "true", "--partition=high", "--nodes=2", "--exclusive")
        wait_until(lambda: all(has_been_told(rank, signal.SIGUSR2) for rank in ranks.values()), lambda: told(run))
    assert wait_for_end(run, starts=2) == "done", told(run)
    assert whys(run) == ["preempted", "done"]
    evaluate = newest(shop.folder_of("evaluate"))
    for task in evaluate.tasks:
        assert wait_for_end(task.folder) == "done", told(task.folder)
    assert attempts(shop.folder_of("model"))[0].start.time >= ended(run)
    for number in range(2):
        measured = json.loads((shop.folder / "runs" / "test" / str(number) / "metrics.json").read_text())
        assert measured["video"]["frames"] == 12
        assert measured["psnr_db"] > 0
        assert measured["model"]["step"] == STEPS
    assert [wait_for(slurm, f"{evaluate.id()}_{number}") for number in range(2)] == ["COMPLETED"] * 2
    done = run_pipeline(regen_submit, shop.file)
    complete = dict.fromkeys(PIPELINE, "its output is complete") | {"embedder": f"all {STEPS} steps are done"}
    assert done == [*(f"{step}: skipped, {why}" for step, why in complete.items()), "nothing is left to do"]
    assert len(attempts(run)) == 2


def test_what_changed_runs_again_with_what_comes_after(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster
) -> None:
    """An output that is gone: the task that makes it, alone. A command with another option: that step and the later
    ones, not the earlier."""
    (shop.folder / "runs" / "test" / "1" / "metrics.json").unlink()
    lines = run_pipeline(regen_submit, shop.file)
    assert ["skipped" in line for line in lines] == [True, True, True, False]
    assert "1/metrics.json is not there" in lines[3]
    evaluate = newest(shop.folder_of("evaluate"))
    assert [task.name for task in evaluate.tasks] == ["mini.evaluate[1]"]
    assert wait_for(slurm, str(evaluate.id())) == "COMPLETED"
    assert (shop.folder / "runs" / "test" / "1" / "metrics.json").exists()
    changed = shop.steps()
    steps: dict[str, dict[str, list[object]]] = changed["steps"]  # type: ignore[assignment]
    steps["model"]["command"] += ["--force"]
    other = shop.folder / "changed.yaml"
    other.write_text(yaml.safe_dump(changed, sort_keys=False))
    shown = regen_submit("pipeline", other, "--cluster", "loopback", "--dry-run")
    table = {line.split()[0]: line for line in shown.stdout.splitlines()[: len(PIPELINE) + 1]}
    assert "its command or its inputs have changed" in table["model"]
    assert "model runs before it" in table["evaluate"]
    assert " complete " in table["shards"]
    assert " complete " in table["embedder"]
    assert "#SBATCH --dependency=afterok:JOB-OF-model" in shown.stdout
    assert shown.stdout.count("#SBATCH --job-name=") == 2


def test_a_step_that_fails_ends_what_follows(regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster) -> None:
    """Nothing waits for ever: Slurm cancels the later steps, and who waits for the pipeline is told."""
    config = str(shop.folder / "tiny.yaml")
    steps = {
        "wrong": {"command": ["config", "show", "/dev/null"]},
        "next": {"command": ["config", "show", config]},
        "last": {"command": ["config", "show", config]},
        "beside": {"command": ["config", "show", config], "after": []},
    }
    file = shop.folder / "failing.yaml"
    write_pipeline(file, shop, "failing", steps)
    waited = regen_submit("pipeline", file, "--cluster", "loopback", "--wait", timeout_s=180)
    assert waited.returncode == 2, waited.stdout + waited.stderr
    jobs = {name: newest_job(shop.folder / "runs" / "failing" / name) for name in steps}
    ids = {name: str(job.id()) for name, job in jobs.items() if job}
    states = {name: wait_for(slurm, number) for name, number in ids.items()}
    assert states == {"wrong": "FAILED", "next": "CANCELLED", "last": "CANCELLED", "beside": "COMPLETED"}
    assert attempts(shop.folder / "runs" / "failing" / "next") == []
    assert waited.stdout.splitlines()[-4:] == [
        "wrong: ended with exit code 2", "next: did not run", "last: did not run", "beside: done",
    ]  # fmt: skip


def test_a_task_of_an_array_that_failed_runs_again_alone(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster
) -> None:
    """The others finish, and what waits for the array is cancelled. A second submission runs the one that is left, and
    then what follows."""
    command = ["config", "show", f"{shop.folder}/{{task}}.yaml"]
    for number in (0, 2):
        (shop.folder / f"{number}.yaml").symlink_to(shop.folder / "tiny.yaml")
    file, base = shop.folder / "array.yaml", shop.folder / "runs" / "array"
    steps = {
        "many": {"command": command, "array": 3},
        "last": {"command": ["config", "show", str(shop.folder / "0.yaml")]},
    }
    write_pipeline(file, shop, "array", steps)
    run_pipeline(regen_submit, file)
    tasks = [base / "many" / "tasks" / f"0000{number}" for number in range(3)]
    assert [wait_for_end(task) for task in tasks] == ["done", "failed", "done"]
    last = newest(base / "last")
    assert wait_for(slurm, str(last.id())) == "CANCELLED"
    (shop.folder / "1.yaml").symlink_to(shop.folder / "tiny.yaml")
    many, following = run_pipeline(regen_submit, file, "--wait")[:2]
    assert "1 task(s) (1 of 3 tasks have not ended well)" in many
    assert "after many (many runs before it)" in following
    assert [whys(task) for task in (*tasks, base / "last")] == [["done"]] * 4
    assert len(newest(base / "many").tasks) == 1
    assert run_pipeline(regen_submit, file)[-1] == "nothing is left to do"


def test_nothing_is_submitted_when_a_step_has_a_problem(regen_submit: Submitter, shop: Workshop) -> None:
    """The checks of all steps are told at once; what an earlier step makes is not missed."""
    far, fit = ({"train": str(shop.folder / "tiny.yaml"), "cluster": {"nodes": 2}} for _ in range(2))
    steps = {
        "good": {"command": ["config", "show", str(shop.folder / "tiny.yaml")], "outputs": ["later/manifest.json"]},
        "fit": {**fit, "overrides": ["name=fit", "data.url=later", "engine.kind=zero3"]},
        "far": {**far, "overrides": ["name=far", "train.batch_global=3", "engine.kind=zero3"]},
        "lost": {**far, "overrides": ["name=lost", "data.url=nowhere", "engine.kind=zero3"]},
    }
    file = shop.folder / "refused.yaml"
    write_pipeline(file, shop, "refused", steps)
    refused = regen_submit("pipeline", file, "--cluster", "loopback")
    assert refused.returncode == 2
    assert "nothing was submitted: 2 problem(s)" in refused.stderr, refused.stderr
    assert "- far: " in refused.stderr
    assert "- lost: " in refused.stderr
    assert newest_job(shop.folder / "runs" / "refused" / "good") is None


def test_steps_before_one_that_slurm_refuses_are_cancelled(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster
) -> None:
    """And it is told. The checks would have refused it, too: hence --force."""
    command = ["config", "show", str(shop.folder / "tiny.yaml")]
    steps = {"first": {"command": command}, "second": {"command": command, "cluster": {"partition": "none such"}}}
    file = shop.folder / "half.yaml"
    write_pipeline(file, shop, "half", steps)
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # so that the first waits
    try:
        refused = regen_submit("pipeline", file, "--cluster", "loopback", "--force")
    finally:
        slurm.run("scontrol", "update", "PartitionName=main", "State=UP")
    first = newest(shop.folder / "runs" / "half" / "first")
    assert refused.returncode != 0
    assert "step second: Slurm refused the job" in refused.stderr, refused.stderr
    assert f"cancelled again: first (job {first.id()})" in refused.stderr
    assert wait_for(slurm, str(first.id())) == "CANCELLED"
    assert newest_job(shop.folder / "runs" / "half" / "second") is None


def test_outputs_in_a_store(shop: Workshop) -> None:
    assert exists(f"{shop.url}/train/manifest.json")
    assert exists(f"{shop.url}/train")
    assert exists(shop.url.rpartition("/")[0])
    assert not exists(f"{shop.url}/train/no such object")
    assert not exists(f"{shop.url}/nothing here")
    assert not exists("s3://no-such-bucket/nothing")
