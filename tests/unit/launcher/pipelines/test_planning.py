"""Which steps of a pipeline are complete, which run already, and which must run: from what earlier submissions left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.attempts import End, Start, Why, archive_history, write_entry
from launcher.job import ID_FILE, JobTask, Submission, new_folder, newest_job, write_job
from launcher.pipelines import planning
from launcher.pipelines.planning import PlannedStep, plan
from launcher.pipelines.schema import load_pipeline
from launcher.submit import SubmissionRequest
from regen_dist.config import to_yaml
from regen_dist.errors import ConfigError
from tests.helpers.tiny import tiny_run

STEPS: dict[str, dict[str, Any]] = {
    "shards": {"command": ["shards", "build", "raw", "--out", "data"], "array": 3, "outputs": ["data/manifest.json"]},
    "embedder": {"train": "tiny.yaml"},
    "evaluate": {"command": ["look", "{task}"], "array": 2, "outputs": ["out/{task}.json"]},
}


def ends(task: JobTask, why: Why, *, again: bool = False, at: float | None = None) -> None:
    """A start of a task that ended: for good, or to be requeued; now, or at a time before."""
    began = time.time() if at is None else at
    write_entry(task.launch, Start(job="1", restart=0, nodes=("a",), time=began))
    write_entry(task.launch, End(why=why, code=0, text="", again=again, time=began))


class Pipe:
    """A pipeline in an empty folder, whose jobs end as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = {name: dict(step) for name, step in STEPS.items()}
        self.alive: set[str] = set()
        monkeypatch.setattr(planning, "is_alive", lambda job: job.name in self.alive)

    def plan(self, cluster: str = "local", *settings: str) -> dict[str, PlannedStep]:
        Path("p.yaml").write_text(yaml.safe_dump({"name": "p", "steps": self.steps}, sort_keys=False))
        return {each.name: each for each in plan(load_pipeline(Path("p.yaml")), cluster, settings)}

    def states(self) -> list[str]:
        return [each.state for each in self.plan().values()]

    def submit(
        self, request: SubmissionRequest, why: Why | None = "done", tasks: Sequence[int] | None = None
    ) -> Submission:
        """As `launcher.submit.submit`; then those of its tasks that are given end, by default all."""
        time.sleep(0.002)  # submissions have a time each
        job = request.job(new_folder(request.base), Path("code"))
        for task in request.tasks:
            if task.progress is None:
                archive_history(task.launch, job.folder.name)
        write_job(job)
        (job.folder / ID_FILE).write_text(f"{len(list(request.base.glob('launch/*')))}\n")
        for number, task in enumerate(request.tasks):
            if why and (tasks is None or number in tasks):
                ends(task, why)
        return job

    def complete(self, *names: str) -> None:
        """Run steps to their end, with what they leave."""
        for name in names or STEPS:
            self.submit(self.plan()[name].request)
            if name == "embedder":
                self.reach(8)
            for output in ("data/manifest.json",) if name == "shards" else ("out/0.json", "out/1.json"):
                Path(output).parent.mkdir(exist_ok=True)
                Path(output).touch()

    @staticmethod
    def reach(step: int) -> None:
        Path("runs/tiny/checkpoints").mkdir(parents=True, exist_ok=True)
        Path("runs/tiny/checkpoints/latest").write_text(f"step-{step:08d}\n")


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipe:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(to_yaml(tiny_run("runs", "data")))
    return Pipe(monkeypatch)


def test_at_first_everything_runs(pipe: Pipe) -> None:
    planned = pipe.plan()
    assert [(each.state, each.why) for each in planned.values()] == [("run", "it has not run yet")] * 3
    assert planned["evaluate"].request.base == Path("runs/p/evaluate").absolute()
    assert planned["embedder"].request.base == Path("runs/tiny").absolute()
    assert [task.command for task in planned["evaluate"].request.tasks] == [("look", "0"), ("look", "1")]


def test_what_is_complete_is_skipped(pipe: Pipe) -> None:
    pipe.complete()
    assert pipe.states() == ["complete"] * 3
    assert pipe.plan()["embedder"].why == "all 8 steps are done"


def test_training_is_complete_by_its_checkpoints_whoever_made_them(pipe: Pipe) -> None:
    pipe.complete("shards")
    pipe.reach(8)
    assert pipe.states() == ["complete", "complete", "run"]
    pipe.reach(5)
    assert pipe.states() == ["complete", "run", "run"]
    assert pipe.plan()["embedder"].why == "it is at step 5 of 8"


def test_more_steps_run_again_and_what_follows(pipe: Pipe) -> None:
    pipe.complete()
    pipe.steps["embedder"]["overrides"] = ["train.steps=9"]
    assert pipe.states() == ["complete", "run", "run"]


@pytest.mark.parametrize("why", ["failed", "stopped", "signal"])
def test_tasks_that_did_not_end_well_run_alone(pipe: Pipe, why: Why) -> None:
    request = pipe.plan()["shards"].request
    pipe.submit(request, tasks=[0, 2])
    ends(request.tasks[1], why)
    Path("data").mkdir()
    Path("data/manifest.json").touch()
    found = pipe.plan()["shards"]
    assert (found.state, found.why) == ("run", "1 of 3 tasks have not ended well")
    assert found.request.tasks == (request.tasks[1],)
    pipe.submit(found.request)
    assert pipe.plan()["shards"].state == "complete", "a part that ended well completes the whole"


def test_an_output_that_is_gone_is_made_again(pipe: Pipe) -> None:
    """By the task that makes it, or by all where that is not told."""
    pipe.complete()
    Path("out/1.json").unlink()
    found = pipe.plan()["evaluate"]
    assert [task.name for task in found.request.tasks] == ["p.evaluate[1]"]
    assert found.why == f"{Path('out/1.json')} is not there"
    Path("out/0.json").unlink()
    assert pipe.plan()["evaluate"].why == "out/0.json and 1 more are not there"
    Path("data/manifest.json").unlink()
    found = pipe.plan()["shards"]
    assert (found.state, len(found.request.tasks)) == ("run", 3)


def test_a_changed_command_runs_again_with_the_commands_after_it(pipe: Pipe) -> None:
    """Not the training: that would throw it away."""
    pipe.steps["last"] = {"command": ["look"], "after": ["shards"]}
    pipe.complete(*STEPS, "last")
    pipe.steps["shards"]["command"] = [*STEPS["shards"]["command"], "--crf", "3"]
    planned = pipe.plan()
    assert [each.state for each in planned.values()] == ["run", "complete", "complete", "run"]
    assert planned["shards"].why == "its command or its inputs have changed"
    assert len(planned["shards"].request.tasks) == 3
    assert planned["last"].why == "shards runs before it"
    expected = "all 8 steps are done, though shards runs before it: another name in its config trains anew"
    assert planned["embedder"].why == expected


def test_a_changed_config_of_complete_training_is_told(pipe: Pipe) -> None:
    pipe.complete()
    pipe.steps["embedder"]["overrides"] = ["optimizer.lr=0.5"]
    assert pipe.plan()["embedder"].state == "complete"
    assert "though its config has changed" in pipe.plan()["embedder"].why


def test_what_ran_before_the_step_above_it_ran_again_is_stale(pipe: Pipe) -> None:
    """Somebody ended the pipeline between the two."""
    pipe.steps = {"shards": pipe.steps["shards"], "evaluate": pipe.steps["evaluate"]}
    pipe.complete("shards", "evaluate")
    pipe.submit(pipe.plan()["shards"].request)
    found = pipe.plan()["evaluate"]
    assert (found.state, found.why) == ("run", "shards ran again after it")
    pipe.submit(found.request)
    assert pipe.states() == ["complete", "complete"]


def test_inputs_count_as_part_of_the_command(pipe: Pipe) -> None:
    """A config with what it extends."""
    Path("base.yaml").write_text("a: 1\n")
    Path("c.yaml").write_text("extends: base.yaml\nb: 2\n")
    Path("list.txt").write_text("x\n")
    pipe.steps["shards"]["inputs"] = ["c.yaml", "list.txt"]
    pipe.complete("shards")
    assert pipe.plan()["shards"].state == "complete"
    Path("c.yaml").write_text("# another remark\nextends: base.yaml\nb: 2\n")
    assert pipe.plan()["shards"].state == "complete"
    for path, text in (("base.yaml", "a: 3\n"), ("list.txt", "y\n")):
        Path(path).write_text(text)
        assert pipe.plan()["shards"].state == "run", path
        pipe.complete("shards")
    Path("list.txt").unlink()
    with pytest.raises(ConfigError, match=r"step shards: inputs: no file list\.txt"):
        pipe.plan()


def test_a_step_that_runs_is_not_submitted_again(pipe: Pipe) -> None:
    pipe.complete("shards")
    job = pipe.submit(pipe.plan()["embedder"].request, why=None)
    pipe.alive = {"tiny"}
    found = pipe.plan()
    assert [each.state for each in found.values()] == ["complete", "alive", "run"]
    assert found["embedder"].job == job
    assert found["embedder"].problem == ""
    assert found["evaluate"].why == "it has not run yet"


def change_command(pipe: Pipe) -> None:
    pipe.steps["shards"]["command"] = ["shards", "build", "other"]


def fail_one(pipe: Pipe) -> None:
    job = newest_job(Path("runs/p/shards").absolute())
    assert job is not None
    ends(job.tasks[1], "failed")


@pytest.mark.parametrize(
    ("change", "expected"),
    [(change_command, "with another command than this one"), (fail_one, "but p.shards[1] failed")],
)
def test_a_job_that_runs_but_is_not_what_is_wanted(pipe: Pipe, change: Callable[[Pipe], None], expected: str) -> None:
    pipe.submit(pipe.plan()["shards"].request, why=None)
    pipe.alive = {"p.shards"}
    job = newest_job(Path("runs/p/shards").absolute())
    assert job is not None
    ends(job.tasks[0], "done")
    ends(job.tasks[1], "preempted", again=True)
    assert pipe.plan()["shards"].problem == "", "it is requeued"
    change(pipe)
    problem = pipe.plan()["shards"].problem
    assert expected in problem
    assert "regen jobs stop" in problem


def test_the_failure_of_an_earlier_submission_is_none_of_a_resumed_job(pipe: Pipe) -> None:
    pipe.submit(pipe.plan()["shards"].request, why=None)
    pipe.alive = {"p.shards"}
    job = newest_job(Path("runs/p/shards").absolute())
    assert job is not None
    ends(job.tasks[1], "failed", at=job.submitted - 60)
    assert pipe.plan()["shards"].problem == ""


def test_a_resumed_part_of_a_step_does_not_stand_for_the_rest(pipe: Pipe) -> None:
    """What follows would begin when this part has ended."""
    request = pipe.plan()["shards"].request
    pipe.submit(request, tasks=[0])
    part = request.part(request.tasks[1:2])
    pipe.submit(part, why=None)
    pipe.alive = {"p.shards"}
    assert "runs or waits, without p.shards[2], which must end well" in pipe.plan()["shards"].problem
    ends(request.tasks[2], "done")
    assert pipe.plan()["shards"].problem == ""


def test_a_job_that_runs_while_what_is_before_it_must_run_again(pipe: Pipe) -> None:
    pipe.complete("shards")
    pipe.submit(pipe.plan()["embedder"].request, why=None)
    pipe.alive = {"tiny"}
    Path("data/manifest.json").unlink()
    assert "while shards before it must run again" in pipe.plan()["embedder"].problem


def test_a_job_that_runs_on_another_cluster(pipe: Pipe) -> None:
    """The number of its process is no job of Slurm, on which others could depend."""
    pipe.submit(pipe.plan()["shards"].request, why=None)
    pipe.alive = {"p.shards"}
    problem = pipe.plan("loopback")["shards"].problem
    assert "(local) runs or waits, elsewhere than on loopback" in problem


def test_settings_of_the_command_line_and_of_a_step(pipe: Pipe) -> None:
    """A command is one process, on one node, however many the trainings have; a step's own keys win."""
    pipe.steps["embedder"]["cluster"] = {"time_min": 30, "environment": {"A": "it's #1"}}
    planned = pipe.plan("loopback", "nodes=2", "time_min=20")
    sizes = {name: (each.request.cluster.nodes, each.request.cluster.time_min) for name, each in planned.items()}
    assert sizes == {"shards": (1, 20), "embedder": (2, 30), "evaluate": (1, 20)}
    assert planned["embedder"].request.cluster.environment["A"] == "it's #1"


def test_the_problems_of_all_steps_are_told_at_once(pipe: Pipe) -> None:
    pipe.steps["embedder"]["overrides"] = ["train.stepz=9"]
    pipe.steps["evaluate"]["cluster"] = {"nodez": 9}
    with pytest.raises(ConfigError) as caught:
        pipe.plan()
    text = str(caught.value)
    assert "p: 2 step(s) are wrong" in text
    assert "train.stepz: unknown key; did you mean train.steps?" in text
    assert "nodez: unknown key; did you mean nodes?" in text


def test_two_steps_in_one_folder(pipe: Pipe) -> None:
    pipe.steps["again"] = {"train": "tiny.yaml"}
    with pytest.raises(ConfigError, match=r"steps embedder and again have one folder, .*runs/tiny"):
        pipe.plan()
