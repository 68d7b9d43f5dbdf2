"""`regen jobs`: which runs it finds, and what it shows of them."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launcher import slurm
from launcher.cli import print_submitted
from launcher.job import JobTask
from launcher.jobs.find import choose_job
from launcher.jobs.table import TAIL_BYTES, JobRow, duration, list_jobs, print_rows, read_end, read_tail
from regen_dist.errors import ConfigError
from tests.helpers.jobs import array_tasks, beaten, committed, ended, made_job, recorded, started, trained

Answers = Callable[[dict[str, tuple[str, str]]], list[list[str]]]


@pytest.fixture
def squeue(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Slurm's answers; the returned list has the jobs of every question."""

    def install(told: dict[str, tuple[str, str]]) -> list[list[str]]:
        asked: list[list[str]] = []

        def queue(jobs: list[str]) -> dict[str, tuple[str, str]]:
            asked.append(list(jobs))
            return told

        monkeypatch.setattr(slurm, "queue", queue)
        return asked

    return install


def rows_of(root: Path, **options: bool) -> dict[str, JobRow]:
    return {row.run: row for row in list_jobs(root, **options)[0]}


def test_a_running_training(tmp_path: Path, squeue: Answers) -> None:
    """Figures of the end of its files; the pace is that of the clock, with saves in it."""
    squeue({"12": ("RUNNING", "None")})
    now = time.time()
    job = made_job(tmp_path / "a", submitted=now - 200)
    for at in (now - 190, now - 100):
        started(job.tasks[0], at=at, step=20)
    trained(tmp_path / "a", range(1, 41), began=now - 100)
    committed(tmp_path / "a", 30, at=now - 60)
    beaten(tmp_path / "a", at=now)
    row = rows_of(tmp_path)["a"]
    assert (row.state, row.note, row.job, row.nodes, row.ranks_per_node, row.restarts) == ("running", "", "12", 2, 4, 1)
    assert (row.step, row.steps, row.loss, row.clips_per_s, row.checkpoint_step) == (40, 100, 1 / 40, 8.0, 30)
    assert row.eta_s == pytest.approx(60 * 2.0)
    assert row.checkpoint_age_s == pytest.approx(60, abs=5)


def test_a_start_that_has_trained_nothing_yet_shows_no_speed(tmp_path: Path, squeue: Answers) -> None:
    squeue({"12": ("RUNNING", "None")})
    now = time.time()
    job = made_job(tmp_path / "a", submitted=now - 500)
    started(job.tasks[0], at=now - 30, step=30)
    trained(tmp_path / "a", range(1, 31), began=now - 400)
    row = rows_of(tmp_path)["a"]
    assert (row.step, row.clips_per_s, row.eta_s) == (30, None, None)


@pytest.mark.parametrize(
    ("age_s", "stood_s", "note"),
    [
        (5, 0.0, ""),
        (600, 0.0, "no heartbeat for 10m"),
        (5, 300.0, "rank 0 is in 'data' for 5m"),
        (5000, 0.0, "no heartbeat since it started 33m ago"),
    ],
)
def test_heartbeats_are_shown_when_something_is_wrong(
    tmp_path: Path, squeue: Answers, age_s: float, stood_s: float, note: str
) -> None:
    squeue({"12": ("RUNNING", "None")})
    now = time.time()
    job = made_job(tmp_path / "a", submitted=now - 3000)
    started(job.tasks[0], at=now - 2000)
    beaten(tmp_path / "a", at=now - age_s, stood_s=stood_s)
    assert rows_of(tmp_path)["a"].note == note


def test_one_question_for_all_jobs_that_have_not_ended(tmp_path: Path, squeue: Answers) -> None:
    asked = squeue({"12": ("PENDING", "Priority")})
    made_job(tmp_path / "waits")
    made_job(tmp_path / "waits too", job_id="13")
    over = made_job(tmp_path / "over", job_id="14")
    started(over.tasks[0])
    ended(over.tasks[0], "done")
    found = rows_of(tmp_path)
    assert asked == [["12", "13"]]
    assert found["waits"].state == "pending"
    assert found["waits"].note == "Priority"
    assert found["waits too"].state == "lost"


def test_without_slurm_the_histories_tell_and_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = made_job(tmp_path / "a")
    started(job.tasks[0])
    found, problems = list_jobs(tmp_path)
    assert [row.state for row in found] == ["running"]
    assert len(problems) == 1
    assert "squeue not found" in problems[0]


def test_runs_are_found_below_and_in_each_other(tmp_path: Path, squeue: Answers) -> None:
    squeue({})
    for name in ("alone", "pipeline/shards", "pipeline/train"):
        made_job(tmp_path / name)
    made_job(tmp_path / "alone" / "checkpoints" / "hidden")
    made_job(tmp_path / "refused", job_id=None)  # no scheduler has taken it
    assert set(rows_of(tmp_path)) == {"alone", "pipeline/shards", "pipeline/train"}
    assert [member.task.name for member in choose_job("pipeline", tmp_path)] == ["shards", "train"]
    assert [member.task.name for member in choose_job(str(tmp_path / "pipeline" / "train"), Path("runs"))] == ["train"]


def test_a_submission_of_another_version_is_named(tmp_path: Path, squeue: Answers) -> None:
    squeue({})
    made_job(tmp_path / "a")
    file = made_job(tmp_path / "b").folder / "job.json"
    file.write_text(file.read_text().replace('"kind": "train"', '"kind": "something new"'))
    found, problems = list_jobs(tmp_path)
    assert [row.run for row in found] == ["a"]
    assert len(problems) == 1
    assert str(file) in problems[0]


def test_each_task_is_that_of_its_newest_submission(tmp_path: Path, squeue: Answers) -> None:
    """One task of an array was submitted again: the others stay those of the first."""
    squeue({"13": ("PENDING", "Resources")})
    base = tmp_path / "array"
    tasks = array_tasks(base, 3)
    made_job(base, tasks, steps=None, submitted=1000.0)
    for task in tasks:
        started(task, at=1001.0, step=None)
        ended(task, "failed" if task is tasks[1] else "done", at=1002.0)
    assert [row.state for row in rows_of(tmp_path).values()] == ["done", "failed", "done"]
    made_job(base, tasks[1:2], steps=None, submitted=2000.0, job_id="13")
    found = rows_of(tmp_path)
    assert {name: row.state for name, row in found.items()} == {
        "array/0": "done", "array/1": "pending", "array/2": "done"
    }  # fmt: skip
    assert [row.job for row in found.values()] == ["12_0", "13", "12_2"]
    for name in ("array/1", "array/tasks/00001"):
        assert [member.task for member in choose_job(name, tmp_path)] == [tasks[1]]


def test_a_run_of_a_sweep_is_found_by_its_own_folder(tmp_path: Path) -> None:
    """The sweep's folder lies beside it."""
    runs = [JobTask(name=name, folder=tmp_path / name, command=("train",)) for name in ("a-lr1", "a-lr2")]
    made_job(tmp_path / "a-sweep", runs, steps=None)
    for run in runs:
        run.launch.mkdir(parents=True)
    chosen = choose_job("a-lr2", tmp_path)
    assert [member.queue_id for member in chosen] == ["12_1"]
    assert len(choose_job("a-sweep", tmp_path)) == 2


def test_large_arrays_are_folded_except_what_has_failed(tmp_path: Path, squeue: Answers) -> None:
    squeue({f"12_{number}": ("RUNNING", "None") for number in range(4)})
    base = tmp_path / "array"
    tasks = array_tasks(base, 20)
    made_job(base, tasks, steps=None)
    for number, task in enumerate(tasks):
        started(task, step=None)
        if number >= 4:
            ended(task, "failed" if number == 7 else "done", text="exit code 3")
    found = rows_of(tmp_path)
    assert list(found) == ["array", "array/7"]
    assert found["array"].note == "20 tasks: 4 running, 1 failed, 15 done"
    assert found["array"].tasks == {"running": 4, "failed": 1, "done": 15}
    assert found["array/7"].note == "exit code 3"
    assert len(rows_of(tmp_path, fold=False)) == 20


@pytest.mark.parametrize(
    ("age_s", "left", "why", "state"),
    [
        (5, "", "", "running"),
        (500, "", "", "lost"),
        (500, "data", "", "done"),
        (500, "data", "no more disk", "failed"),
    ],
)
def test_runs_without_the_launcher_are_told_by_their_heartbeats(
    tmp_path: Path, age_s: float, left: str, why: str, state: str
) -> None:
    run = tmp_path / "plain"
    trained(run, range(1, 9), began=time.time() - 1000)
    (run / "config.yaml").write_text("train:\n  steps: 8\n")
    beaten(run, at=time.time() - age_s, left=left, why=why)
    row = rows_of(tmp_path)["plain"]
    assert (row.state, row.step, row.steps, row.checkpoint_step) == (state, 8, 8, None)
    committed(tmp_path / "disk", 4, at=time.time())
    (run / "config.yaml").write_text(
        f"train:\n  steps: 8\nname: checkpoints\ncheckpoint:\n  url: {tmp_path / 'disk'}/\n"
    )
    assert rows_of(tmp_path)["plain"].checkpoint_step == 4
    with pytest.raises(ConfigError, match=r"not started by `regen submit`.*/logs;.*STOP"):
        choose_job("plain", tmp_path)


def test_only_the_end_of_a_record_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(2 * 2**30)  # a hole: it takes no room
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"kind": "train", "step": 7, "time": 1.0}\n{"kind": "train", "st')
    before = _bytes_read()
    assert [line["step"] for line in read_tail(path)] == [7]
    assert _bytes_read() - before < 2**30


def _bytes_read() -> int:
    """Bytes that this process has read from files and pipes so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.parametrize("extra", [-1, 0, 1, 5])
def test_a_cut_line_is_left_out_and_a_whole_one_kept(tmp_path: Path, extra: int) -> None:
    path = tmp_path / "file"
    path.write_text("first\nsecond\n")
    assert read_end(path, len("second\n") + extra) == ("second\n" if extra >= 0 else "")
    assert read_end(path, 1000) == "first\nsecond\n"


def test_checkpoints_in_a_store_are_told_by_the_record(tmp_path: Path, squeue: Answers) -> None:
    """Also where the save was long before the end of the file; a save that failed is none."""
    squeue({"12": ("RUNNING", "None")})
    now = time.time()
    job = made_job(tmp_path / "a", checkpoints="s3://bucket/a", submitted=now - 100)
    started(job.tasks[0], at=now - 90)
    recorded(tmp_path / "a", [{"kind": "checkpoint", "step": 20, "problem": None, "time": now - 50}])
    recorded(tmp_path / "a", [{"kind": "checkpoint", "step": 30, "problem": "no room", "time": now - 40}])
    trained(tmp_path / "a", range(1, 2 * TAIL_BYTES // 80), began=now - 80, step_s=0.01)
    row = rows_of(tmp_path)["a"]
    assert row.checkpoint_step == 20
    assert row.checkpoint_age_s == pytest.approx(50, abs=5)


WORST = JobRow(
    run="regen_k32_content_and_motion_long", state="requeued", note="preempted; Priority", nodes=64, ranks_per_node=8,
    job="12345678_1000", restarts=12, step=120000, steps=500000, loss=0.123456, clips_per_s=1234.5, eta_s=3 * 86400,
    checkpoint_step=119000, checkpoint_age_s=3600 * 3,
)  # fmt: skip


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_and_loses_nothing(width: int) -> None:
    output = io.StringIO()
    print_rows(Console(file=output, width=width), [WORST, JobRow(run="b[0]", state="done")])
    lines = output.getvalue().splitlines()
    table = [line for line in lines if not line.startswith(WORST.run + ":")]
    assert all(len(line) <= width for line in table)
    folded = "".join(line[1:].split(" ")[0] for line in table)
    assert WORST.run in folded
    assert "preempted; Priority" in output.getvalue()
    for part in ("64x8", "12", "120000/500000", "0.1235", "1234", "3d0h", "119000", "3h00", "requeued", "saved"):
        assert part in "\n".join(table)
    assert "b[0]" in output.getvalue(), "brackets are no markup"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (720, "12m"), (11100, "3h05"), (200000, "2d7h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_name_that_is_none_is_answered_with_near_ones(tmp_path: Path) -> None:
    made_job(tmp_path / "nano")
    with pytest.raises(ConfigError, match=r"nanno: no such folder .* there are nano"):
        choose_job("nanno", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing was submitted here"):
        choose_job("empty", tmp_path)


def test_json_and_no_torch(tmp_path: Path) -> None:
    """The whole command, in an interpreter of its own."""
    job = made_job(tmp_path / "a")
    started(job.tasks[0])
    ended(job.tasks[0], "failed", text="exit code 3")
    code = (
        "import sys; from launcher.jobs import cli, find, logs, stop, table\n"
        f"cli.app(['--root', {str(tmp_path)!r}, '--json'], standalone_mode=False)\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'wandb'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["runs"]
    assert (row["run"], row["state"], row["note"], row["steps"]) == ("a", "failed", "exit code 3", 100)
    with pytest.raises(ConfigError, match="no such folder"):
        list_jobs(tmp_path / "absent")


def test_a_link_to_a_run_is_that_run(tmp_path: Path, squeue: Answers) -> None:
    """Submitted or not, and whatever the link is called; by its name it is found too."""
    squeue({})
    root = tmp_path / "runs"
    made_job(root / "m")
    beaten(root / "plain", at=time.time())
    for name, target in (("a_link", "m"), ("z_link", "m"), ("a_plain", "plain"), ("z_plain", "plain")):
        (root / name).symlink_to(target)
    assert sorted(row.run for row in list_jobs(root)[0]) == ["m", "plain"]
    assert [member.task.folder for member in choose_job("z_link", root)] == [root / "m"]
    (tmp_path / "other").symlink_to(root)
    assert len(list_jobs(tmp_path)[0]) == 2


def test_a_run_that_was_moved_says_where_it_was(tmp_path: Path) -> None:
    made_job(tmp_path / "a")
    beaten(tmp_path / "a", at=time.time())
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/b: was moved; it was submitted as {tmp_path}/a, .*[Mm]ove it"):
        choose_job("b", tmp_path)


def test_commands_to_copy_are_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path with a space and a quote comes back whole from the shell."""
    folder = tmp_path / "my runs" / "it's"
    print_submitted(made_job(folder))
    line = capsys.readouterr().out.splitlines()[-1]
    for command in line.removeprefix("watch it: ").split("; ")[1:]:
        assert str(folder) in shlex.split(command)
