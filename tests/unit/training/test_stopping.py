"""Stopping and guarding: flags that are set, budgets that are kept."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from regen_dist.config.run import TrainConfig
from regen_dist.distributed.engine import StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import TrainingError
from regen_dist.programs import STOP_CHECKED
from regen_dist.training.guards import NonFiniteGuard
from regen_dist.training.stopping import SIGNALS, SignalInbox, Stopper, process_age_s
from tests.helpers.machine import make_read_only, small_disk


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_the_flag(tmp_path: Path, number: signal.Signals) -> None:
    """A signal does nothing but tell, when asked, that the rank wants to stop and why."""
    with Stopper(tmp_path, Ranks()) as stopper:
        assert not stopper.wanted()
        os.kill(os.getpid(), number)
        assert stopper.wanted()
        assert stopper.reason == number.name


def test_the_first_reason_stays(tmp_path: Path) -> None:
    """An impatient second signal changes nothing."""
    with Stopper(tmp_path, Ranks()) as stopper:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stopper.wanted()
        assert stopper.reason == "SIGUSR1"


def test_a_stop_that_came_while_the_launcher_started_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher has looked for an earlier one."""
    monkeypatch.setenv(STOP_CHECKED, "1")
    (tmp_path / "STOP").touch()
    with Stopper(tmp_path, Ranks()) as stopper:
        assert stopper.wanted()
        assert stopper.reason == "the file STOP"


def test_a_signal_that_came_before_the_run_began(tmp_path: Path) -> None:
    """While a rank imports and builds; and after the run a signal is kept, too, instead of ending the process."""
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        inbox = SignalInbox().listen()
        os.kill(os.getpid(), signal.SIGUSR2)
        with Stopper(tmp_path, Ranks(), earlier=inbox) as stopper:
            assert stopper.wanted()
            assert stopper.reason == "SIGUSR2"
        os.kill(os.getpid(), signal.SIGTERM)
        assert inbox.first == "SIGUSR2"
        inbox.close()
        os.kill(os.getpid(), signal.SIGTERM)
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_the_handlers_are_given_back(tmp_path: Path) -> None:
    """Afterwards every signal has the handler that it had before, also when the block ends with an error."""
    before = [signal.getsignal(number) for number in SIGNALS]

    def fail() -> None:
        with Stopper(tmp_path, Ranks()):
            assert [signal.getsignal(number) for number in SIGNALS] != before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_file_stop(tmp_path: Path) -> None:
    """A file STOP in the run folder asks rank 0 to stop; the others do not look; the next start removes it."""
    with Stopper(tmp_path, Ranks()) as stopper, Stopper(tmp_path, Ranks(1, 2, 1)) as other:
        assert not stopper.wanted()
        (tmp_path / "STOP").touch()
        assert stopper.wanted()
        assert stopper.reason == "the file STOP"
        assert not other.wanted()
    with Stopper(tmp_path, Ranks(1, 2, 1)):
        assert (tmp_path / "STOP").exists(), "rank 1 leaves it to rank 0"
    with Stopper(tmp_path, Ranks()) as again:
        assert not again.wanted()
        assert not (tmp_path / "STOP").exists()


def test_signals_while_saving_disturb_nothing(tmp_path: Path) -> None:
    """Ten more signals come while a read and a write are blocked: both end as if nothing had been, and the reason is
    still the first one."""
    reader, writer = os.pipe()
    payload = os.urandom(1 << 20)  # many times what a pipe holds, so that the writer blocks again and again

    def disturb() -> None:
        for _ in range(10):
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            time.sleep(0.005)
        with os.fdopen(writer, "wb") as file:
            file.write(payload)

    with Stopper(tmp_path, Ranks()) as stopper:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper.wanted()
        thread = threading.Thread(target=disturb)
        thread.start()
        with os.fdopen(reader, "rb") as file:
            saved = file.read()
        thread.join()
        assert stopper.reason == "SIGINT"
    assert saved == payload


def test_the_time_limit(tmp_path: Path) -> None:
    """Each rank wants to stop the lead before the limit, counted from when the process started, and not before."""
    now = 5000.0
    stopper = Stopper(tmp_path, Ranks(1, 2, 1), time_limit_s=3600, lead_s=120, clock=lambda: now, age_s=30)
    now = 5000.0 + 3600 - 120 - 30 - 0.001
    assert not stopper.wanted()
    now += 0.002
    assert stopper.wanted()
    assert stopper.reason == "the time limit of 3600 s"
    now = 0.0
    assert stopper.wanted(), "once wanted it stays so"


def test_no_limit_and_an_earlier_reason(tmp_path: Path) -> None:
    """Without a limit no time is too long; a signal that came before the limit stays the reason."""
    now = 0.0
    assert not Stopper(tmp_path, Ranks(), clock=lambda: now, age_s=1e9).wanted()
    with Stopper(tmp_path, Ranks(), time_limit_s=1209600, clock=lambda: now, age_s=0) as stopper:
        os.kill(os.getpid(), signal.SIGTERM)
        now = 1e7
        assert stopper.wanted()
        assert stopper.reason == "SIGTERM"
    late = Stopper(tmp_path, Ranks(), time_limit_s=1209600, clock=lambda: now, age_s=1209600)
    assert late.wanted()
    assert late.reason == "the time limit of 1209600 s"


def test_the_age_of_a_process() -> None:
    """Importing counts: a process is as old as the system says, whether or not it asked before; this one is older than
    one that it starts."""
    began = time.monotonic()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        time.sleep(0.3)
        age_s = process_age_s(Path(f"/proc/{child.pid}/stat"))
        passed_s = time.monotonic() - began
        child.communicate()
    assert 0.2 < age_s < passed_s + 0.1  # the system counts in hundredths
    assert age_s < process_age_s() < 7 * 24 * 3600


def test_a_name_with_brackets_and_spaces(tmp_path: Path) -> None:
    """The fields are counted from the end of the name, whatever the name holds: this one started 0 ticks after boot."""
    stat = tmp_path / "stat"
    stat.write_text("7 (a) 9 (b c) S " + "999999999999 " * 18 + "0 " + "999999999999 " * 30)
    boot_age_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert boot_age_s <= process_age_s(stat) < boot_age_s + 10


@pytest.mark.parametrize("text", ["", "7 (a) b) S 1 2", "7 (name) S " + "x " * 30])
def test_a_system_that_does_not_tell_the_age(tmp_path: Path, text: str) -> None:
    """No such file, a short one, another form: the age is 0, and time counts from then on."""
    stat = tmp_path / "stat"
    assert process_age_s(stat) == 0.0
    stat.write_text(text)
    assert process_age_s(stat) == 0.0


@pytest.mark.parametrize("lead_s", [100.0, 120.0])
def test_a_lead_as_long_as_the_limit_is_refused(lead_s: float) -> None:
    """A run that would stop after its first step is a mistake in its config, and told so."""
    train = {"steps": 10, "batch_global": 2, "time_limit_s": 100.0}
    with pytest.raises(ValidationError, match=r"time_limit_lead_s 1\d0 leaves no time .* time_limit_s 100; raise"):
        TrainConfig.model_validate(train | {"time_limit_lead_s": lead_s})
    assert TrainConfig.model_validate(train | {"time_limit_lead_s": 99.0}).time_limit_s == 100


def test_the_budget_of_bad_steps() -> None:
    """Skipped steps are counted, over resumes too; one more than the budget ends the run with a word on what to do."""
    guard = NonFiniteGuard(budget=2, skipped=1)
    guard.check(5, StepResult(True, 1.0))
    assert guard.skipped == 1
    guard.check(6, StepResult(False, float("nan")))
    assert guard.skipped == 2
    with pytest.raises(
        TrainingError, match=r"step 7: 3 steps had non-finite gradients, .* allows 2\. Lower optimizer\.lr"
    ):
        guard.check(7, StepResult(False, float("inf")))


def test_a_budget_of_zero_allows_none() -> None:
    """The strictest setting stops at the first bad step and at no good one."""
    guard = NonFiniteGuard(budget=0)
    guard.check(1, StepResult(True, 1.0))
    with pytest.raises(TrainingError, match="step 2"):
        guard.check(2, StepResult(False, float("nan")))


def test_a_file_that_cannot_be_removed_is_ignored_and_a_new_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The STOP of the previous start on a disk that was mounted read-only; later it is writable again."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "STOP").touch()
        make_read_only(disk)
        with Stopper(disk, Ranks()) as stopper:
            assert not stopper.wanted()
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            (disk / "STOP").unlink()
            assert not stopper.wanted()
            (disk / "STOP").touch()
            assert stopper.wanted()
    assert "STOP cannot be removed, and is ignored: " in capsys.readouterr().err
