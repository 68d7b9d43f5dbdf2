"""A pipeline on a real Slurm with a real store: from video files to measured reconstructions, skipped when complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from launcher.job import newest_job
from launcher.pipelines.planning import exists
from launcher.seaweed import ObjectServer
from launcher.slurm_loopback import SlurmCluster
from regen_dist.config import to_yaml
from tests.helpers.launching import Submitter, attempts, held, told, wait_for_end, wait_until, whys
from tests.helpers.objects import use
from tests.helpers.slurm import wait_for
from tests.helpers.tiny import tiny_run
from tests.helpers.video import moving_square, write_video

STEPS = ("shards", "embedder", "model", "evaluate")
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
            folder / "runs", f"{self.url}/train", engine__kind="zero3", train__steps=30, checkpoint__every=10,
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
                "embedder": {"train": str(self.folder / "tiny.yaml"), "cluster": {"nodes": 2}},
                "model": {
                    "command": ["checkpoint", "export", f"{self.folder}/runs/tiny", "--out", model, "--no-statistics"],
                    "outputs": [f"{model}/config.yaml"],
                },
                "evaluate": {
                    "command": measure, "array": 2, "outputs": [f"{out}/0/metrics.json", f"{out}/1/metrics.json"]
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


def write_pipeline(file: Path, shop: Workshop, name: str, steps: Mapping[str, object]) -> None:
    text = yaml.safe_dump({"name": name, "output": str(shop.folder / "runs"), "steps": steps}, sort_keys=False)
    file.write_text(text)


def run_pipeline(regen_submit: Submitter, file: Path, *more: object) -> list[str]:
    """What `regen submit pipeline` printed."""
    ended = regen_submit("pipeline", file, "--cluster", "loopback", *more)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.splitlines()


def test_a_pipeline_from_videos_to_measured_reconstructions(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster
) -> None:
    """Shards by an array, training on two nodes that is preempted by a signal on its way, an export, an array that
    measures. While it runs a second submission submits nothing; after it everything is skipped."""
    lines = run_pipeline(regen_submit, shop.file)
    assert [line.partition(":")[0] for line in lines] == list(STEPS)
    assert "after shards" in lines[1]
    embedder = newest_job(shop.folder_of("embedder"))
    assert embedder is not None
    with held(shop.folder_of("embedder"), 2, 3):
        again = run_pipeline(regen_submit, shop.file)
        assert "skipped, its output is complete" in again[0]
        assert all("runs or waits" in line for line in again[1:]), again
        slurm.run("scancel", "--signal=USR2", str(embedder.id()))
    assert wait_for_end(shop.folder_of("embedder"), starts=2) == "done", told(shop.folder_of("embedder"))
    assert whys(shop.folder_of("embedder")) == ["signal", "done"]
    evaluate = newest_job(shop.folder_of("evaluate"))
    assert evaluate is not None
    for task in evaluate.tasks:
        assert wait_for_end(task.folder) == "done", told(task.folder)
    for number in range(2):
        measured = json.loads((shop.folder / "runs" / "test" / str(number) / "metrics.json").read_text())
        assert measured
    assert wait_for(slurm, f"{evaluate.id()}_1") == "COMPLETED"
    done = run_pipeline(regen_submit, shop.file)
    assert done == [f"{step}: skipped, its output is complete" for step in STEPS]
    assert len(attempts(shop.folder_of("embedder"))) == 2


def test_what_changed_runs_again_with_what_comes_after(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster
) -> None:
    """An output that is gone, and a command with another option: that step and the later ones, not the earlier."""
    (shop.folder / "runs" / "test" / "1" / "metrics.json").unlink()
    lines = run_pipeline(regen_submit, shop.file)
    assert ["skipped" in line for line in lines] == [True, True, True, False]
    assert "metrics.json is not there" in lines[3]
    evaluate = newest_job(shop.folder_of("evaluate"))
    assert evaluate is not None
    for task in evaluate.tasks:
        assert wait_for_end(task.folder) == "done", told(task.folder)
    for task in range(2):
        assert wait_for(slurm, f"{evaluate.id()}_{task}") == "COMPLETED"
    changed = shop.steps()
    steps: dict[str, dict[str, list[object]]] = changed["steps"]  # type: ignore[assignment]
    steps["model"]["command"] += ["--force"]
    other = shop.folder / "changed.yaml"
    other.write_text(yaml.safe_dump(changed, sort_keys=False))
    ended = regen_submit("pipeline", other, "--cluster", "loopback", "--dry-run")
    assert "command has" in ended.stdout
    assert "model runs before" in " ".join(ended.stdout.split())


def test_a_step_that_fails_ends_what_follows(regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster) -> None:
    """Nothing waits for ever: Slurm cancels the later steps."""
    steps = {
        "wrong": {"command": ["config", "show", "/dev/null"]},
        "next": {"command": ["config", "show", str(shop.folder / "tiny.yaml")]},
        "last": {"command": ["config", "show", str(shop.folder / "tiny.yaml")]},
    }
    file = shop.folder / "failing.yaml"
    file.write_text(
        yaml.safe_dump({"name": "failing", "output": str(shop.folder / "runs"), "steps": steps}, sort_keys=False)
    )
    run_pipeline(regen_submit, file)
    jobs = {name: newest_job(shop.folder / "runs" / "failing" / name) for name in steps}
    ids = {name: str(job.id()) for name, job in jobs.items() if job}
    assert wait_for(slurm, ids["wrong"]) == "FAILED"
    assert wait_for(slurm, ids["next"]) == "CANCELLED"
    assert wait_for(slurm, ids["last"]) == "CANCELLED"
    assert attempts(shop.folder / "runs" / "failing" / "next") == []


def test_a_task_of_an_array_that_failed_runs_again_alone(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster
) -> None:
    """The second submission of the pipeline runs the one that is left."""
    needed = shop.folder / "later.yaml"
    command = ["config", "show", f"{shop.folder}/{{task}}.yaml"]
    (shop.folder / "0.yaml").symlink_to(shop.folder / "tiny.yaml")
    file = shop.folder / "array.yaml"
    steps = {"many": {"command": command, "array": 2}}
    write_pipeline(file, shop, "array", steps)
    run_pipeline(regen_submit, file)
    first, second = (shop.folder / "runs" / "array" / "many" / "tasks" / f"0000{number}" for number in range(2))
    assert wait_for_end(first) == "done", told(first)
    assert wait_for_end(second) == "failed", told(second)
    job = newest_job(shop.folder / "runs" / "array" / "many")
    assert job is not None
    assert wait_for(slurm, f"{job.id()}_1") == "FAILED"
    needed.symlink_to(shop.folder / "tiny.yaml")
    needed.rename(shop.folder / "1.yaml")
    (line,) = run_pipeline(regen_submit, file)
    assert "1 of its tasks are left" in line
    wait_until(lambda: whys(second) == ["done"], lambda: told(second))
    assert len(attempts(first)) == 1


def test_nothing_is_submitted_when_a_step_has_a_problem(regen_submit: Submitter, shop: Workshop) -> None:
    """The checks of all steps are told at once; what an earlier step makes is not missed."""
    steps = {
        "good": {"command": ["config", "show", str(shop.folder / "tiny.yaml")]},
        "far": {"train": str(shop.folder / "tiny.yaml"), "overrides": ["name=far", "train.batch_global=3"],
                "cluster": {"nodes": 2}},
    }  # fmt: skip
    file = shop.folder / "refused.yaml"
    file.write_text(
        yaml.safe_dump({"name": "refused", "output": str(shop.folder / "runs"), "steps": steps}, sort_keys=False)
    )
    ended = regen_submit("pipeline", file, "--cluster", "loopback")
    assert ended.returncode == 2
    assert "far: " in ended.stderr
    assert "nothing was submitted" in ended.stderr
    assert newest_job(shop.folder / "runs" / "refused" / "good") is None


def test_outputs_in_a_store(shop: Workshop) -> None:
    assert exists(f"{shop.url}/train/manifest.json")
    assert exists(f"{shop.url}/train")
    assert not exists(f"{shop.url}/train/no such object")
    assert not exists(f"{shop.url}/nothing here")
