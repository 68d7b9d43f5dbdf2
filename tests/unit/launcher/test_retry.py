"""Decisions about a task, from its history alone; and the records around a start."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import attempts
from launcher.attempts import (
    Attempt,
    End,
    Start,
    Why,
    archive_history,
    attempts_since,
    read_history,
    submission_time,
    write_entry,
)
from launcher.cluster import ClusterConfig, RetryConfig
from launcher.job import JobTask, Submission, TaskProgress, new_folder, newest_job, read_job, write_job
from launcher.retry import (
    bad_nodes,
    begin,
    combined_exit_code,
    decide_end,
    decide_start,
    end,
    is_complete,
    newest_step,
)
from launcher.submit import take_snapshot
from regen_dist.config.version import code_version
from regen_dist.errors import RegenError

RETRY = RetryConfig(failures=2, starts_without_progress=3, failures_of_a_node=2, starts=10)


def attempt(step: int | None, why: Why | None, *nodes: str) -> Attempt:
    """A start from `step`, and why it ended, at the fault of some nodes."""
    start = Start(job="1", restart=0, nodes=("node1",), step=step, time=0.0)
    if why is None:
        return Attempt(start, None)
    return Attempt(start, End(why=why, code=1, text="", again=True, at_fault=nodes, time=1.0))


def history(*ends: tuple[int | None, Why | None]) -> list[Attempt]:
    return [attempt(step, why) for step, why in ends]


def test_a_first_start_goes() -> None:
    verdict = decide_start([], step=0, steps=100, stop=False, retry=RETRY)
    assert (verdict.go, verdict.text) == (True, "from the beginning")


@pytest.mark.parametrize(("step", "goes"), [(99, True), (100, False), (101, False), (None, True)])
def test_a_finished_training_is_a_no_op(step: int | None, goes: bool) -> None:
    """Told by its checkpoints; where the store does not answer the rank finds out itself."""
    verdict = decide_start(history((0, "done")), step=step, steps=100, stop=False, retry=RETRY)
    assert (verdict.go, verdict.code) == (goes, 0)


def test_a_finished_command_is_a_no_op() -> None:
    assert not decide_start(history((None, "done")), step=None, steps=None, stop=False, retry=RETRY).go
    assert decide_start(history((None, "failed")), step=None, steps=None, stop=False, retry=RETRY).go
    assert is_complete(history((None, "done"), (None, "unknown")), step=None, steps=None)


def test_a_task_that_was_asked_to_stop_does_not_start() -> None:
    """Its code is that of a run that can be resumed: what depends on it shall not run."""
    verdict = decide_start([], step=5, steps=100, stop=True, retry=RETRY)
    assert (verdict.go, verdict.code) == (False, 75)


@pytest.mark.parametrize("why", ["preempted", "time limit", "signal"])
def test_what_was_told_to_go_goes_on(why: Why) -> None:
    """As often as it gets further."""
    before = history(*((step, why) for step in range(0, 80, 10)))
    verdict = decide_end([*before, attempt(80, None)], code=75, why=why, step=90, retry=RETRY)
    assert (verdict.go, verdict.text) == (True, f"{why}: continues from step 90")


@pytest.mark.parametrize("why", ["preempted", "time limit", "signal", "unknown"])
def test_no_progress_between_restarts_ends_it(why: Why) -> None:
    """Three starts from one step, whatever ended them; two are not enough, and one step further begins anew."""
    two = [attempt(10, why), attempt(10, None)]
    assert decide_end(two, code=75, why=why, step=10, retry=RetryConfig(failures=9, starts_without_progress=3)).go
    three = [attempt(10, why), *two]
    stopped = decide_end(three, code=75, why=why, step=10, retry=RETRY)
    assert (stopped.go, stopped.code) == (False, 75)
    assert "it was started 3 times from step 10 and made no new checkpoint" in stopped.text
    assert decide_end(three, code=75, why="preempted", step=11, retry=RETRY).go
    assert not decide_start(history(*((10, why),) * 3), step=10, steps=100, stop=False, retry=RETRY).go


def test_failures_have_a_budget_that_a_checkpoint_renews() -> None:
    def end(before: Sequence[Attempt], step: int) -> bool:
        return decide_end([*before, attempt(step, None)], code=137, why="failed", step=step, retry=patient).go

    patient = RetryConfig(failures=2, starts_without_progress=100)
    assert end([], 10)
    assert end(history((10, "failed")), 10)
    assert not end(history((10, "failed"), (10, "node lost")), 10)
    assert end(history((10, "failed"), (10, "failed")), 20)


def test_failures_of_a_command_are_counted_in_a_row() -> None:
    """It has no steps to tell progress by: what was preempted in between has not failed."""

    def end(*ends: Why) -> bool:
        before = [attempt(None, why) for why in ends]
        return decide_end([*before, attempt(None, None)], code=1, why="failed", step=None, retry=RETRY).go

    assert end("failed")
    assert not end("failed", "failed")
    assert end("failed", "failed", "preempted")
    assert end(*["preempted"] * 8)


@pytest.mark.parametrize("code", [2, 4, 5, 6])
def test_what_would_be_said_again_is_not_tried_again(code: int) -> None:
    """A wrong config, a checkpoint that is refused, a missing kernel, a training that went wrong."""
    verdict = decide_end([attempt(0, None)], code=code, why="failed", step=0, retry=RETRY)
    assert (verdict.go, verdict.code) == (False, code)


@pytest.mark.parametrize("code", [1, 3, 7, 137, 139])
def test_what_may_pass_is_tried_again(code: int) -> None:
    """Any other error, data that did not come, a hang, a kill, a crash."""
    assert decide_end([attempt(0, None)], code=code, why="failed", step=0, retry=RETRY).go


@pytest.mark.parametrize(("lasted_s", "step", "goes"), [(9.0, 0, False), (300.0, 0, True), (9.0, 10, True)])
def test_data_that_is_not_there_is_looked_for_twice(lasted_s: float, step: int, goes: bool) -> None:
    """A store that does not answer takes its time; and a run that has got on since has had its data."""
    start, end = attempt(0, "failed")
    assert end is not None
    before = Attempt(start, end.model_copy(update={"code": 3, "time": lasted_s}))
    decision = decide_end([before, attempt(0, None)], code=3, why="failed", step=step, retry=RetryConfig())
    assert (decision.go, decision.code) == (goes, 0 if goes else 3)


def test_the_last_fuse() -> None:
    """However well it gets on, nothing is started without an end."""
    many = history(*((step, "preempted") for step in range(10)))
    assert not decide_start(many, step=10, steps=100, stop=False, retry=RETRY).go


@pytest.mark.parametrize(("why", "code"), [("done", 0), ("stopped", 75)])
def test_the_end(why: Why, code: int) -> None:
    verdict = decide_end([attempt(0, None)], code=code, why=why, step=9, retry=RETRY)
    assert (verdict.go, verdict.code) == (False, code)


def test_a_node_that_fails_twice_is_bad() -> None:
    once = [attempt(0, "failed", "node1"), attempt(5, "failed", "node2")]
    assert bad_nodes(once, RETRY) == ()
    assert bad_nodes([*once, attempt(9, "node lost", "node1")], RETRY) == ("node1",)


@pytest.mark.parametrize(
    ("codes", "srun", "expected"),
    [
        ([0, 0], 0, 0),
        ([75, 75], 0, 75),
        ([0, 75], 0, 6),
        ([137, 1], 137, 137),
        ([75, 7], 7, 7),
        ([0, None], 0, 1),
        ([75, None], 143, 143),
        ([None, None], 0, 1),
        ([], 0, 1),
    ],
    ids="done resume mixed first-failure hang lost-word killed-step nothing none".split(),  # noqa: SIM905
)
def test_one_code_for_all_ranks(codes: list[int | None], srun: int, expected: int) -> None:
    """The first rank that failed has the say; a rank that left no word is a failure, also where srun saw none."""
    assert combined_exit_code(codes, srun) == expected


# The first and the last word on a start: what is read, what is noted, and who is at fault.


class Place:
    """A scheduler that says what it was told to."""

    def __init__(self, restart: int = 0, nodes: tuple[str, ...] = ("node1", "node2"), why: Why = "signal") -> None:
        self.job, self.restart, self.nodes = "77", restart, nodes
        self.why, self.down = why, tuple[str, ...]()

    def was_cancelled(self) -> bool:
        return False

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
        attempts.write_rank_exit(
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


def test_folders_sort_by_submission_when_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the end of summer time, or by a login node in another time zone."""
    clocks = ["20251026-025959", "20251026-025959", "20251026-020000", "20251026-020000", "20251026-030100"]
    monkeypatch.setattr("launcher.job.time", SimpleNamespace(strftime=lambda _: clocks.pop(0)))
    made = [new_folder(tmp_path).name for _ in range(5)]
    assert made == sorted(made)
    assert (made[0], made[-1]) == ("20251026-025959", "20251026-030100")


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


@pytest.mark.parametrize("late_s", [-30.0, 30.0])
def test_clocks_of_nodes_and_of_the_submitter_may_differ(job: Submission, late_s: float) -> None:
    """A start counts for the submission that made it, and for no later one."""
    task = job.tasks[0]
    ahead = job.model_copy(update={"submitted": time.time() - late_s})
    begin(ahead, task, Place())
    assert len(attempts_since(read_history(task.launch), ahead.submitted)) == 1
    write_entry(task.launch, Start(job="77", restart=1, nodes=(), time=time.time() + late_s))  # on another node
    assert attempts_since(read_history(task.launch), submission_time([task.launch])) == []


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
    attempts.write_rank_exit(task.launch, "77", 0, rank=1, node="node2", code=137, signals=())
    attempts.write_rank_exit(task.launch, "77", 0, rank=0, node="node1", code=1, signals=("SIGTERM",))
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
    assert attempts.read_rank_exits(task.launch, "77", 5, 2)[0] is not None


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


def test_a_copy_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.submit.code_version", interrupt)
    with pytest.raises(KeyboardInterrupt):
        take_snapshot(tmp_path / "code")
    assert list((tmp_path / "code").iterdir()) == []


def test_a_copy_of_a_linked_folder(tmp_path: Path) -> None:
    """What changes in it makes another copy, too."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    (checkout / "configs").mkdir(parents=True)
    elsewhere.mkdir()
    (checkout / "configs" / "mine").symlink_to(elsewhere)
    for text in ("a", "b"):
        (elsewhere / "x.yaml").write_text(text)
        assert (take_snapshot(tmp_path / "code", checkout) / "configs" / "mine" / "x.yaml").read_text() == text


def test_a_copy_of_files_that_are_not_utf_8(tmp_path: Path) -> None:
    """In a checkout: a changed file in Latin-1, and a new one with such a name."""
    checkout, notes = tmp_path / "checkout", tmp_path / "checkout" / "configs" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("caf\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
        subprocess.run([*git, *command], check=True)
    notes.write_bytes("café\n".encode("latin-1"))
    Path(os.fsdecode(bytes(notes.parent) + b"/\xe9.txt")).touch()
    copy = take_snapshot(tmp_path / "code", checkout)
    assert b"+caf\xe9\n" in (copy / "changes.patch").read_bytes()
    assert len(list((copy / "configs").iterdir())) == 2


def test_a_history_that_cannot_be_written_ends_no_task_and_starts_none_for_ever(
    job: Submission, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full from the first word on: the start goes, its code is kept, and nothing is started again by a
    rule that cannot count."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launcher.retry.write_entry", refuse)
    monkeypatch.setattr("launcher.attempts.write_text_atomically", refuse)
    (task,) = job.tasks
    assert begin(job, task, Place()).go
    ranks_end(job, 0, 75, 75)
    verdict = end(job, task, Place(why="preempted"), 75)
    assert (verdict.go, verdict.code) == (False, 75)
    assert "not restarted, because its history cannot be written" in verdict.text
    said = capsys.readouterr().err
    assert "this start is missing from the history" in said
    assert "exit status 75 of rank 1 was not recorded" in said
