"""The first and the last word on a start: what is read, what is noted, and who is at fault."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher import retry
from launcher.cluster import ClusterConfig
from launcher.job import JobTask, Submission, TaskProgress, new_folder, newest_job, read_job, write_job
from launcher.retry import Start, Why, archive_history, begin, end, newest_step, read_history, write_entry
from launcher.submit import take_snapshot
from regen_dist.config.version import code_version
from regen_dist.errors import RegenError


class Place:
    """A scheduler that says what it was told to."""

    def __init__(self, restart: int = 0, nodes: tuple[str, ...] = ("node1", "node2"), why: Why = "signal") -> None:
        self.job, self.restart, self.nodes = "77", restart, nodes
        self.why, self.down = why, tuple[str, ...]()

    def stop_reason(self, job: Submission) -> Why:
        return self.why

    def down_nodes(self, nodes: Sequence[str]) -> tuple[str, ...]:
        return tuple(node for node in nodes if node in self.down)

    def excludable(self, job: Submission, nodes: Sequence[str]) -> tuple[str, ...]:
        return tuple(nodes)


@pytest.fixture
def job(tmp_path: Path) -> Submission:
    """Training of 40 steps on two nodes."""
    progress = TaskProgress(checkpoints=str(tmp_path / "checkpoints"), steps=40)
    task = JobTask(name="run", folder=tmp_path, command=("train", "x"), progress=progress)
    made = Submission(
        name="run", kind="train", cluster=ClusterConfig(time_min=60, nodes=2), cluster_name="mine", tasks=(task,),
        distributed=True, folder=new_folder(tmp_path), workdir=tmp_path, code=tmp_path, submitted=1.5,
    )  # fmt: skip
    write_job(made)
    return made


def checkpoint(job: Submission, step: int) -> None:
    folder = job.tasks[0].folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    (folder / "latest").write_text(f"step-{step:08d}")


def ranks_end(job: Submission, restart: int, *codes: int) -> None:
    for rank, code in enumerate(codes):
        retry.write_rank_exit(
            job.tasks[0].launch, "77", restart, rank=rank, node=f"node{rank + 1}", code=code, signals=()
        )


def test_a_job_is_read_as_it_was_written(job: Submission, tmp_path: Path) -> None:
    assert read_job(job.folder) == job
    assert newest_job(tmp_path) == job
    later = job.model_copy(update={"folder": new_folder(tmp_path)})
    write_job(later)
    assert newest_job(tmp_path) == later
    (later.folder / "job.json").write_text('{"name": 1}')
    with pytest.raises(RegenError, match="not a job of this version"):
        newest_job(tmp_path)


def test_a_run_from_start_to_end(job: Submission) -> None:
    task = job.tasks[0]
    assert begin(job, task, Place()).go
    checkpoint(job, 20)
    ranks_end(job, 0, 75, 75)
    assert end(job, task, Place(why="preempted"), 0).go
    assert begin(job, task, Place(restart=1)).text == "from step 20"
    checkpoint(job, 40)
    ranks_end(job, 1, 0, 0)
    assert end(job, task, Place(restart=1), 0) == (False, "done", 0)
    assert not begin(job, task, Place(restart=2)).go
    assert [(each.start.step, each.end and each.end.why) for each in read_history(task.launch)] == [
        (0, "preempted"), (20, "done")
    ]  # fmt: skip


def test_the_file_stop_ends_it_for_good(job: Submission) -> None:
    task = job.tasks[0]
    begin(job, task, Place())
    ranks_end(job, 0, 75, 75)
    task.stop_file.touch()
    assert end(job, task, Place(), 0) == (False, "stopped", 75)
    assert begin(job, task, Place(restart=1)).code == 75


def test_a_task_that_was_to_go_on_and_need_not_is_done(job: Submission) -> None:
    """A signal that came as the last step was made: the job is requeued, and finds nothing to do."""
    task = job.tasks[0]
    begin(job, task, Place())
    checkpoint(job, 40)
    ranks_end(job, 0, 75, 75)
    assert end(job, task, Place(why="time limit"), 0).go
    assert not begin(job, task, Place(restart=1)).go
    (only,) = read_history(task.launch)
    assert only.end is not None
    assert (only.end.why, only.end.again, only.end.code) == ("done", False, 0)


def test_the_rank_that_failed_first_names_the_node(job: Submission) -> None:
    """Also when the others fail because of it; an error of ours says nothing about a node."""
    task = job.tasks[0]
    begin(job, task, Place())
    retry.write_rank_exit(task.launch, "77", 0, rank=1, node="node2", code=137, signals=())
    retry.write_rank_exit(task.launch, "77", 0, rank=0, node="node1", code=1, signals=("SIGTERM",))
    verdict = end(job, task, Place(), 137)
    assert verdict.go
    assert "(rank 1 on node2, exit code 137)" in verdict.text
    begin(job, task, Place(restart=1))
    ranks_end(job, 1, 3, 3)
    end(job, task, Place(restart=1), 3)
    assert [each.end.at_fault for each in read_history(task.launch) if each.end] == [("node2",), ()]


def test_a_hang_names_the_node_of_the_rank_that_stood_still(job: Submission) -> None:
    """Not that of the rank that told of it."""
    task = job.tasks[0]
    begin(job, task, Place())
    ranks_end(job, 0, 7, 137)
    told = {"kind": "quiet", "ranks": [{"host": "node2.cluster.local"}]}
    (task.folder / "hang.json").write_text(json.dumps(told))
    end(job, task, Place(), 7)
    (only,) = read_history(task.launch)
    assert only.end is not None
    assert only.end.at_fault == ("node2",)


@pytest.mark.parametrize("down", [(), ("node2",)])
def test_a_start_that_left_no_word(job: Submission, down: tuple[str, ...]) -> None:
    """The next one notes it: its node is down, or it is not known."""
    task, place = job.tasks[0], Place(restart=1, nodes=("node1", "node3"))
    begin(job, task, Place())
    place.down = down
    assert begin(job, task, place).go
    first, second = read_history(task.launch)
    assert first.end is not None
    assert (first.end.why, first.end.at_fault) == (("node lost", ("node2",)) if down else ("unknown", ()))
    assert second.end is None


def test_what_ranks_leave_does_not_pile_up(job: Submission) -> None:
    task = job.tasks[0]
    for restart in range(6):
        ranks_end(job, restart, 0, 0)
    assert begin(job, task, Place(restart=6)).go
    assert len(list((task.launch / "ranks").iterdir())) == 3
    assert retry.read_rank_exits(task.launch, "77", 5, 2)[0] is not None


def test_lines_that_were_cut_short_are_left_out(job: Submission) -> None:
    task = job.tasks[0]
    begin(job, task, Place())
    with (task.launch / "starts.jsonl").open("a") as file:
        file.write('{"kind":"end","why":"do')
    ranks_end(job, 0, 0, 0)
    end(job, task, Place(), 0)
    (only,) = read_history(task.launch)
    assert only.end is not None
    assert only.end.why == "done"


def test_a_history_that_is_set_aside_is_kept(job: Submission) -> None:
    task = job.tasks[0]
    begin(job, task, Place())
    archive_history(task.launch, "old")
    assert read_history(task.launch) == []
    assert (task.launch / "starts-old.jsonl").exists()
    write_entry(task.launch, Start(job="1", restart=0, nodes=("n",), time=0.0))
    assert len(read_history(task.launch)) == 1


def test_how_far_a_run_is(job: Submission, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing yet is 0; a pointer that makes no sense, or a store that does not answer, is not known."""
    progress = job.tasks[0].progress
    assert newest_step(None) is None
    assert newest_step(progress) == 0
    checkpoint(job, 30)
    assert newest_step(progress) == 30
    (job.tasks[0].folder / "checkpoints" / "latest").write_text("nonsense")
    assert newest_step(progress) is None
    assert "cannot determine the newest step" in capsys.readouterr().err


def test_the_copy_of_the_code(tmp_path: Path, root: Path) -> None:
    """The packages and configs as they are, once; it says which version it is; nothing of git or caches is in it."""
    copy = take_snapshot(tmp_path / "code")
    assert take_snapshot(tmp_path / "code") == copy
    assert (copy / "regen_dist" / "training" / "loop.py").read_bytes() == (
        root / "regen_dist" / "training" / "loop.py"
    ).read_bytes()
    assert (copy / "VERSION").read_text().strip() == code_version()
    assert not list(copy.rglob("__pycache__"))
    assert not list((tmp_path / "code").glob(".*"))
    changed = tmp_path / "other"
    (changed / "launcher").mkdir(parents=True)
    (changed / "launcher" / "x.py").write_text("")
    assert take_snapshot(tmp_path / "code", changed) != copy


def test_a_history_that_cannot_be_written_ends_no_task_and_starts_none_for_ever(
    job: Submission, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full from the first word on: the start goes, its code is kept, and nothing is started again by a
    rule that cannot count."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launcher.retry.write_entry", refuse)
    monkeypatch.setattr("launcher.retry.write_text_atomically", refuse)
    (task,) = job.tasks
    assert begin(job, task, Place()).go
    ranks_end(job, 0, 75, 75)
    verdict = end(job, task, Place(why="preempted"), 75)
    assert (verdict.go, verdict.code) == (False, 75)
    assert "not restarted, because its history cannot be written" in verdict.text
    said = capsys.readouterr().err
    assert "this start is missing from the history" in said
    assert "exit status 75 of rank 1 was not recorded" in said
