"""Commands side by side: all run, failures are named together, each has its log."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from regen_dist.errors import TrainingError
from tests.helpers.launching import wait_until
from tests.helpers.processes import wait_until_gone
from tools.bench.compression_runs import run_side_by_side


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_command_runs_with_its_share_of_the_cores_and_its_own_log(tmp_path: Path) -> None:
    done: list[str] = []
    show = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    run_side_by_side({"a": _python(show), "b": _python(show)}, logs=tmp_path / "logs", at_once=2, done=done.append)
    assert sorted(done) == ["a", "b"]
    for name in ("a", "b"):
        assert (tmp_path / "logs" / f"{name}.log").read_text().startswith("threads ")


def test_a_failure_is_named_after_the_others_have_run(tmp_path: Path) -> None:
    commands = {"bad": _python("raise SystemExit(7)"), "good": _python(f"open({str(tmp_path / 'ran')!r}, 'w')")}
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed: bad \(exit code 7"):
        run_side_by_side(commands, logs=tmp_path, at_once=1)
    assert (tmp_path / "ran").exists()


def test_an_interruption_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    started, saved, later = (tmp_path / name for name in ("started", "saved", "later"))
    runs = _python(
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(saved)!r}, 'w'), sys.exit(75)))\n"
        f"open({str(started)!r}, 'w')\n"
        "time.sleep(120)"
    )

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began, done = time.monotonic(), list[str]()
    commands = {"first": runs, "second": _python(f"open({str(later)!r}, 'w')")}
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(commands, logs=tmp_path, at_once=1, done=done.append)
    assert saved.exists()
    assert not later.exists()
    assert done == [], "what was ended is not done"
    assert time.monotonic() - began < 60


def test_a_killed_bench_leaves_no_training_behind(tmp_path: Path) -> None:
    """SIGKILL of the bench: the kernel ends what it has started."""
    code = (
        "import sys; from pathlib import Path; from tools.bench.compression_runs import run_side_by_side\n"
        "wait = 'import os, time; print(os.getpid(), flush=True); time.sleep(300)'\n"
        "run_side_by_side({'a': [sys.executable, '-c', wait]}, logs=Path(sys.argv[1]), at_once=1)\n"
    )
    log = tmp_path / "a.log"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as bench:
        try:
            wait_until(lambda: log.is_file() and log.read_text().strip().isdigit(), lambda: "it did not start")
        finally:
            bench.kill()
    pid = int(log.read_text())
    wait_until_gone([pid])
