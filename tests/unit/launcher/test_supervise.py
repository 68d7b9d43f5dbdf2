"""The local launcher: environment, exit codes, signals and orphans of ranks, locks of killed builds, early checks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.supervise import (
    _Job,
    clear_stale_locks,
    extensions_folder,
    launch,
    rank_environment,
    rank_environments,
    train_locally,
)
from regen_dist.errors import ConfigError, TrainingError
from tests.helpers.machine import runs, wait_until_gone


def program(code: str) -> list[str]:
    """A rank that runs `code`, with its rank in `rank`."""
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.02)


def start_launcher(code: str, folder: Path, ranks: int = 2, grace_s: float = 20.0) -> subprocess.Popen[str]:
    """A launcher in a process of its own, so that signals can be sent to it."""
    text = (
        "import sys; from pathlib import Path; from launcher.supervise import launch\n"
        f"sys.exit(launch({program(code)!r}, ranks={ranks}, logs=Path({str(folder)!r}), grace_s={grace_s}))"
    )
    return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True)


def test_every_rank_is_told_who_it_is_and_where_to_meet(tmp_path: Path) -> None:
    code = f"""
import json
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
open(f"{tmp_path}/{{rank}}.json", "w").write(json.dumps([os.environ[name] for name in names]))
"""
    assert launch(program(code), ranks=3, logs=tmp_path) == 0
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [each[:4] for each in told] == [[str(rank), str(rank), "3", "3"] for rank in range(3)]
    assert {tuple(each[4:]) for each in told} == {("127.0.0.1", told[0][5])}
    assert 1024 < int(told[0][5]) < 65536


def test_cores_are_shared_out_unless_the_user_has_said_otherwise() -> None:
    cores = len(os.sched_getaffinity(0))
    assert rank_environment({}, 1)["OMP_NUM_THREADS"] == str(cores)
    assert rank_environment({}, 10 * cores)["OMP_NUM_THREADS"] == "1"
    assert rank_environment({"OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"


def test_heaps_take_large_pages_unless_the_user_has_tuned_them() -> None:
    assert rank_environment({}, 1)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert rank_environment({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, 1)["GLIBC_TUNABLES"].endswith("=0")


def test_ranks_above_zero_write_to_their_own_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(program("print('hello from', rank)"), ranks=2, logs=tmp_path / "logs") == 0
    assert "hello from 0" in capfd.readouterr().out
    assert "hello from 1" in (tmp_path / "logs" / "rank_1.log").read_text()
    assert not (tmp_path / "logs" / "rank_0.log").exists()


def test_arguments_reach_the_ranks_literally(tmp_path: Path) -> None:
    argument = "a b 'c' \"d\" $(touch x) *"
    code = f"open('{tmp_path}/argument', 'w').write(sys.argv[1])"
    assert launch([*program(code), argument], ranks=1, logs=tmp_path) == 0
    assert (tmp_path / "argument").read_text() == argument


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((75, 75), 75), ((0, 75), TrainingError.exit_code), ((0, 4), 4), ((75, 4), 4)],
)
def test_exit_code(codes: tuple[int, int], expected: int, tmp_path: Path) -> None:
    assert launch(program(f"sys.exit({codes}[rank])"), ranks=2, logs=tmp_path) == expected


def test_when_a_rank_fails_the_others_are_ended_and_its_code_is_returned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "if rank == 1:\n    print('what went wrong')\n    sys.exit(3)\ntime.sleep(60)"
    started_s = time.monotonic()
    assert launch(program(code), ranks=3, logs=tmp_path) == 3
    assert time.monotonic() - started_s < 50, "they would sleep for 60 s"
    said = capfd.readouterr().err
    assert "rank 1 failed first, with exit code 3" in said
    assert "what went wrong" in said


def test_a_rank_that_does_not_end_when_asked_is_killed(tmp_path: Path) -> None:
    code = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{tmp_path}/{{rank}}", "w").close()
while not os.path.exists("{tmp_path}/0"): time.sleep(0.01)
if rank == 1: sys.exit(9)
time.sleep(60)
"""
    started_s = time.monotonic()
    assert launch(program(code), ranks=2, logs=tmp_path, grace_s=0.5) == 9
    assert time.monotonic() - started_s < 50, "it would sleep for 60 s"


def test_death_by_a_signal_is_128_plus_its_number(tmp_path: Path) -> None:
    code = "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)"
    assert launch(program(code), ranks=2, logs=tmp_path) == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGUSR2, signal.SIGUSR2),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_a_signal_reaches_every_rank_once(number: signal.Signals, told: signal.Signals, tmp_path: Path) -> None:
    code = f"""
seen = []
signal.signal({int(told)}, lambda number, frame: seen.append(number))
open(f"{tmp_path}/ready{{rank}}", "w").close()
deadline = time.monotonic() + 30
while not seen and time.monotonic() < deadline: time.sleep(0.01)
time.sleep(0.3)
open(f"{tmp_path}/seen{{rank}}", "w").write(str(len(seen)))
sys.exit(75)
"""
    launcher = start_launcher(code, tmp_path)
    wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == 75
    assert [(tmp_path / f"seen{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_a_signal_that_comes_while_ranks_start_reaches_those_that_follow(tmp_path: Path) -> None:
    """Otherwise rank 0 would stop, and wait for ever for a rank that was never told."""
    code = f"""
if rank == 0: signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(75))
open(f"{tmp_path}/ready{{rank}}", "w").close()
time.sleep(10); sys.exit(75)
"""
    job, environments = _Job(grace_s=5.0, logs=tmp_path), rank_environments(rank_environment(os.environ, 2), 2)
    try:
        job.start(program(code), 0, environments[0])
        wait_until((tmp_path / "ready0").exists)
        job._send(signal.SIGUSR1)
        job.start(program(code), 1, environments[1])
        assert job.wait() == 128 + signal.SIGUSR1  # rank 1 was told before it could listen
    finally:
        job.kill()


def test_a_second_interrupt_ends_the_ranks_at_once(tmp_path: Path) -> None:
    code = f"""
seen = []
signal.signal(signal.SIGINT, lambda number, frame: open(f"{tmp_path}/seen{{rank}}", "w").close())
open(f"{tmp_path}/ready{{rank}}", "w").close()
time.sleep(60); time.sleep(60)
"""
    launcher = start_launcher(code, tmp_path)
    wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGINT)
    wait_until(lambda: all((tmp_path / f"seen{rank}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == 128 + signal.SIGKILL


def test_the_ranks_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    code = f"""
open(f"{tmp_path}/tmp{{rank}}", "w").write(str(os.getpid()))
os.rename(f"{tmp_path}/tmp{{rank}}", f"{tmp_path}/pid{{rank}}")
time.sleep(60)
"""
    launcher = start_launcher(code, tmp_path)
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    wait_until(lambda: all(file.exists() for file in files))
    pids = [int(file.read_text()) for file in files]
    assert all(map(runs, pids))
    launcher.kill()
    launcher.wait()
    wait_until_gone(pids)


# A lock that a killed build left is deleted; one that a live build holds is not.


def _lock(folder: Path, name: str, age_s: float = 3600.0) -> Path:
    lock = folder / name / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age_s,) * 2)
    return lock


def test_a_lock_that_nobody_holds_is_deleted(tmp_path: Path) -> None:
    lock = _lock(tmp_path, "operator")
    assert clear_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_lock_that_a_builder_holds_open_is_kept(tmp_path: Path) -> None:
    lock = _lock(tmp_path, "operator")
    with lock.open():
        assert clear_stale_locks(tmp_path) == []
    assert lock.exists()


def test_a_young_lock_is_kept(tmp_path: Path) -> None:
    lock = _lock(tmp_path, "operator", age_s=0.0)
    assert clear_stale_locks(tmp_path) == []
    assert lock.exists()


def test_a_folder_that_is_not_there_has_no_locks(tmp_path: Path) -> None:
    assert clear_stale_locks(tmp_path / "absent") == []


# The launcher checks a config before it starts anything, and does so without torch.


def _launcher(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_a_wrong_config_ends_with_code_2_before_any_rank_starts(root: Path) -> None:
    done = _launcher("train", "configs/embedder/nano.yaml", "--tasks-per-node", "2", "train.stepz=3", cwd=root)
    assert done.returncode == 2
    assert "train.stepz" in done.stderr
    assert "did you mean train.steps?" in done.stderr
    assert "Traceback" not in done.stderr


def test_nodes_of_a_cluster_compile_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another node holds looks stale here, and what it compiled may not run here."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "36")
    monkeypatch.setattr("socket.gethostname", lambda: "node1")
    assert extensions_folder() == Path(".cache/torch_extensions/node1").resolve()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert extensions_folder() == Path(".cache/torch_extensions").resolve()


def test_a_batch_that_cannot_be_divided_is_refused_with_what_fits(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"8 samples at a time, .* of 3 ranks; ranks that fit: 1, 2, 4, 8"):
        train_locally(root / "configs/embedder/nano.yaml", [], ranks=3)


def test_one_process_engine_refuses_more_ranks(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kind=zero3"):
        train_locally(root / "configs/embedder/nano.yaml", ["engine.kind=plain"], ranks=2)


def test_the_launcher_imports_no_torch() -> None:
    code = "import sys, launcher.supervise, launcher.supervise, launcher.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
