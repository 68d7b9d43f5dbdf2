"""`regen jobs logs`: the end of a log, and what is appended to it until the job has ended."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.job import Submission
from launcher.jobs.find import Member
from launcher.jobs.logs import Follower, choose_logs, last_bytes, last_lines, launcher_logs, show
from regen_dist.config.files import write_text_atomically
from regen_dist.errors import ConfigError
from tests.helpers.jobs import SUBMITTED, array_tasks, ended, made_job, started, wait_until


def log(job: Submission, text: str, rank: int = 0) -> Path:
    path = job.tasks[0].logs / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
    return path


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("", 5, []),
        ("one\ntwo\nthree\n", 2, ["two", "three"]),
        ("one\ntwo\nthr", 2, ["two", "thr"]),
        ("one\n\n", 2, ["one", ""]),
        ("0%\r50%\r100%\nbar 1\rbar 2\r\n", 5, ["100%", "bar 2"]),
        ("long " * 50_000 + "\nshort\n", 1, ["short"]),
    ],
)
def test_the_newest_lines(tmp_path: Path, text: str, count: int, expected: list[str]) -> None:
    path = tmp_path / "log"
    path.write_bytes(text.encode())
    assert last_lines(path, count) == expected
    assert text.encode().endswith(last_bytes(path, count))


def test_lines_over_many_blocks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number} {'x' * 100}\n" for number in range(5000)))
    assert [line.split()[1] for line in last_lines(path, 3000)] == list(map(str, range(2000, 5000)))


def test_which_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0's; before it has one, what the launcher said; another rank's on demand."""
    job = made_job(tmp_path / "a")
    member = Member(job, 0)
    with pytest.raises(ConfigError, match="has no such log yet"):
        show(member, None, launcher=False, lines=5)
    write_text_atomically(job.folder / "submitit" / "12_0_log.err", "launcher: a: from the beginning\n")
    write_text_atomically(job.folder / "submitit" / "12_0_log.out", "")
    show(member, None, launcher=False, lines=5)
    log(job, "step 1\nstep 2\n")
    log(job, "rank 1 speaks\n", rank=1)
    show(member, None, launcher=False, lines=1)
    show(member, 1, launcher=False, lines=1)
    show(member, None, launcher=True, lines=1)
    told = "launcher: a: from the beginning"
    assert capsys.readouterr().out.splitlines() == [told, "step 2", "rank 1 speaks", told]
    with pytest.raises(ConfigError, match=r"rank_7\.log: not there; there are logs of ranks 0 to 1"):
        show(member, 7, launcher=False, lines=1)


def test_other_files_beside_the_logs(tmp_path: Path) -> None:
    job = made_job(tmp_path / "a")
    log(job, "words\n", rank=3)
    (job.tasks[0].logs / "rank_0.old.log").touch()
    with pytest.raises(ConfigError, match=r"rank_7\.log: not there; there are logs of ranks 3 to 3"):
        show(Member(job, 0), 7, launcher=False, lines=1)


def test_following_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """A thousand ranks have two files each of what srun and Submitit said; a shell's limit is 1024, often."""
    job = made_job(tmp_path / "a")
    started(job.tasks[0])
    ended(job.tasks[0], "done")
    for rank in range(40):
        write_text_atomically(job.folder / "submitit" / f"12_{rank}_log.out", f"rank {rank}\n")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = [sys.executable, "-m", "tools.cli", "jobs", "logs", str(tmp_path / "a"), "--launcher", "--follow"]
    done = subprocess.run(
        command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, hard)), capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.count("\nrank ")) == (0, 40), done.stderr


def test_the_launchers_words_on_one_task_of_an_array(tmp_path: Path) -> None:
    job = made_job(tmp_path / "array", array_tasks(tmp_path / "array", 3), steps=None)
    for name in ("12_0_0_log.err", "12_1_0_log.err", "12_1_0_log.out", "12_2_0_log.err"):
        write_text_atomically(job.folder / "submitit" / name, "words\n")
    assert [path.name for path in launcher_logs(Member(job, 1))] == ["12_1_0_log.err", "12_1_0_log.out"]


def test_of_several_tasks_one_must_be_named(tmp_path: Path) -> None:
    base = tmp_path / "array"
    tasks = array_tasks(base, 3)
    job = made_job(base, tasks, steps=None)
    for task in tasks:
        started(task)
        ended(task, "failed" if task is tasks[2] else "done")
    with pytest.raises(ConfigError, match=r"3 tasks; .*: array/2 \(failed\), array/0 \(done\), array/1 \(done\)"):
        choose_logs([Member(job, index) for index in range(3)], tmp_path)


def test_a_file_that_grows_is_cut_or_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old\n")
    follower = Follower(path, 4)
    assert follower.read() == b""
    with path.open("a") as file:
        file.write("more\n")
    assert follower.read() == b"more\n"
    path.write_text("x\n")  # cut
    assert follower.read() == b"x\n"
    with path.open("a") as file:
        file.write("last words\n")
    path.rename(tmp_path / "log.1")
    assert follower.read() == b"last words\n"
    path.write_text("a new file\n")
    assert follower.read() == b"a new file\n"
    follower.close()


@contextmanager
def following(root: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`regen jobs logs --follow`, its output a pipe; Slurm is not there, so that histories tell how jobs stand."""
    command = [sys.executable, "-m", "tools.cli", "jobs", "logs", *arguments, "--root", str(root), "--follow"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PATH": str(root)}
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_following_lasts_over_a_requeue_until_the_end(tmp_path: Path) -> None:
    """It begins before the job does; a bar that is drawn over itself is a line."""
    job = made_job(tmp_path / "a")
    task = job.tasks[0]
    with following(tmp_path, "a") as process:
        assert process.stdout is not None
        started(task)
        log(job, "step 1\nsaving 1%\rsaving 100%\n")
        assert [process.stdout.readline() for _ in range(2)] == ["step 1\n", "saving 100%\n"]
        ended(task, "preempted", again=True)
        time.sleep(0.6)
        assert process.poll() is None
        started(task, at=SUBMITTED + 30)
        log(job, "resumed\nno line break at the e")
        assert process.stdout.readline() == "resumed\n"
        log(job, "nd")
        ended(task, "done", at=SUBMITTED + 40)
        out, err = process.communicate(timeout=60)
    assert (out, err) == ("no line break at the end\n", "a: done\n")
    assert process.returncode == 0


def test_ctrl_c_ends_following_without_a_traceback(tmp_path: Path) -> None:
    job = made_job(tmp_path / "a")
    started(job.tasks[0])
    log(job, "one\ntwo\nthree\n")
    with following(tmp_path, "a", "--lines", "1") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "three\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (out, err) == ("", "")
    assert process.returncode == 130


def test_watching_ends_with_ctrl_c_too(tmp_path: Path) -> None:
    made_job(tmp_path / "a")
    output = tmp_path / "output"
    with output.open("w") as file:
        command = [sys.executable, "-m", "tools.cli", "jobs", "--root", str(tmp_path), "--watch", "1"]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PATH": "/none"})
    try:
        wait_until(lambda: output.read_text().count("pending") >= 2, output.read_text)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in output.read_text()
