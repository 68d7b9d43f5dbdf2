"""Who may train a run: the living are respected, the dead are not, and of several one wins."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from regen_dist.checkpoint import claims
from regen_dist.checkpoint.claims import Claim, Claims, Holder, Patience, parse_holder, this_process
from regen_dist.data.storage.store import Store
from regen_dist.errors import CheckpointError, RunBusy
from regen_dist.jsontext import json_text
from tests.helpers.jobs import wait_until
from tests.helpers.machine import wait_until_gone
from tests.helpers.tiny import tiny_run

QUICK = Patience(beat_s=0.1, look_s=0.6, stale_s=1.5, poll_s=0.05)
STEADY = QUICK._replace(look_s=60.0, stale_s=60.0)  # for signs of life, which may be late on a loaded machine
_HOLD = """
import sys, time
from regen_dist.checkpoint.claims import Claim, this_process
from pathlib import Path
claim = Claim(sys.argv[1], this_process(Path(sys.argv[2])))
claim.take()
print("held", flush=True)
time.sleep(120)
"""


@pytest.fixture(params=["folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def holding(place: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the claim."""
    command = [sys.executable, "-c", _HOLD, place, str(tmp_path / "theirs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def claim(place: str, patience: Patience = QUICK, **changes: Any) -> Claim:
    """One of this process, or of one that is like it but for the changes."""
    return Claim(place, replace(this_process(Path("mine")), **changes), patience=patience, log=lambda text: None)


def written(place: str) -> list[Holder | None]:
    store = Store(f"{place}/claims")
    return [parse_holder(store.get(name)) for name in store.list()]


def elsewhere(holder: Holder, **changes: Any) -> Holder:
    """The same holder on another machine."""
    return replace(holder, boot="another", host="node7", **changes)


def leave(place: str, holder: Holder, number: int = 1) -> None:
    """Leave the claim of a process that ended without a word."""
    Store(f"{place}/claims").put(f"{number:08d}.json", json_text(asdict(holder)).encode())


def test_the_living_is_named(place: str, holding: subprocess.Popen[str]) -> None:
    for act in (claim(place).take, claim(place).refuse_if_taken):
        with pytest.raises(RunBusy) as error:
            act()
        (holder,) = written(place)
        assert holder is not None
        told = str(error.value)
        for part in (f"rank 0 on {holder.host}", f"process {holding.pid}", " since 20", "theirs", "touch STOP"):
            assert part in told
    assert error.value.exit_code == 8
    holding.send_signal(signal.SIGSTOP)  # it lives, and may go on
    with pytest.raises(RunBusy):
        claim(place).take()


def test_one_that_was_killed_is_known_at_once(place: str, holding: subprocess.Popen[str]) -> None:
    """Dead by SIGKILL, though nobody has buried it; and an id that another process has by now."""
    holding.kill()
    wait_until_gone([holding.pid])
    claim(place).refuse_if_taken()
    mine = claim(place)
    mine.take()
    (holder,) = written(place)
    assert holder is not None
    assert holder.pid == os.getpid()
    mine.release()
    assert written(place) == []
    leave(place, replace(holder, started=holder.started + 1))
    again = claim(place)
    again.take()
    assert len(written(place)) == 1
    again.release()


def test_it_is_given_back(place: str) -> None:
    first = claim(place)
    first.take()
    with pytest.raises(RunBusy):
        claim(place).take()
    first.release()
    second = claim(place)
    second.take()
    first.release()  # nothing: it is not its own any more
    second.check()
    second.release()


def test_a_job_that_slurm_starts_again_goes_on_at_once(place: str) -> None:
    """On whatever machine: the start before has ended. The same start is another step of the job, which may live."""
    held = elsewhere(this_process(Path("theirs")), job="77", restart=0, written=time.time())
    leave(place, held)
    began = time.monotonic()
    again = claim(place, STEADY, job="77", restart=1)
    again.take()
    assert time.monotonic() - began < STEADY.look_s / 2, "it was not waited for"
    again.release()
    leave(place, held)
    with pytest.raises(RunBusy), beating(place, held):
        claim(place, STEADY, job="77", restart=0).take()


class beating:
    """A process of another machine that gives signs of life, though its clock may be wrong."""

    def __init__(self, place: str, holder: Holder, clock_s: float = 0.0) -> None:
        self._place, self._holder, self._clock_s = place, holder, clock_s
        self._stop = threading.Event()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(QUICK.beat_s):
            number += 1
            leave(self._place, replace(self._holder, number=number, written=time.time() + self._clock_s))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("clock_s", [0.0, -86400.0, 86400.0])
def test_one_of_another_machine_lives_while_it_writes(place: str, clock_s: float) -> None:
    """Whatever its clock says."""
    held = elsewhere(this_process(Path("theirs")), written=time.time() + clock_s)
    leave(place, held)
    with beating(place, held, clock_s), pytest.raises(RunBusy, match="node7"):
        claim(place, STEADY).take()


@pytest.mark.parametrize(
    ("clock_s", "least_s"), [(-86400.0, QUICK.look_s), (0.0, QUICK.look_s), (86400.0, QUICK.stale_s)]
)
def test_one_of_another_machine_is_dead_when_it_is_silent(place: str, clock_s: float, least_s: float) -> None:
    leave(place, elsewhere(this_process(Path("theirs")), written=time.time() + clock_s))
    began = time.monotonic()
    mine = claim(place)
    mine.take()
    assert time.monotonic() - began >= least_s
    mine.check()
    mine.release()


def test_what_cannot_be_read_is_waited_for(place: str) -> None:
    Store(f"{place}/claims").put("00000003.json", b"{}")
    mine = claim(place)
    mine.take()
    assert len(written(place)) == 1
    mine.release()


def test_of_many_that_start_at_once_one_wins(place: str) -> None:
    """At an empty place, and where one died; by threads that stand for processes of other machines."""
    for stale in (False, True):
        if stale:
            leave(place, replace(this_process(Path("theirs")), started=1), number=4)
        results: list[str] = []
        barrier = threading.Barrier(8)

        def start(number: int, results: list[str] = results, barrier: threading.Barrier = barrier) -> None:
            one = claim(place, token=f"token{number}")
            barrier.wait()
            try:
                one.take()
                results.append("won")
                wait_until(lambda: len(results) == 8, lambda: results)  # whoever comes late finds it held
                one.release()
            except RunBusy:
                results.append("refused")

        threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == ["refused"] * 7 + ["won"]
        assert written(place) == []


def test_who_was_taken_over_writes_nothing_more(place: str) -> None:
    """A process that was suspended for long: it sees it before it saves, and by itself."""
    mine = claim(place)
    mine.take()
    (held,) = Store(f"{place}/claims").list()
    Store(f"{place}/claims").delete(held)
    leave(place, elsewhere(this_process(Path("theirs"))), number=2)
    with pytest.raises(CheckpointError, match=r"taken over by rank 0 on node7 .* Nothing more is written"):
        mine.check()
    assert "taken over" in mine.lost
    mine.release()
    assert len(written(place)) == 1


def test_other_files_are_no_claims(place: str) -> None:
    """NFS renames a file that is deleted while somebody reads it."""
    Store(f"{place}/claims").put(".nfs000000000001f4a2", b"{}")
    mine = claim(place)
    mine.take()
    assert [path.name for path in Path(place, "claims").glob("*.json")] == ["00000001.json"]
    mine.check()
    mine.release()


def test_a_sign_of_life_that_comes_too_late_takes_nothing_back(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that waits for the store (a network that was down) until another process has taken over."""
    mine, theirs = claim(place, STEADY._replace(beat_s=60.0)), claim(place, boot="another", host="node7")
    mine.take()
    put = mine._store.put

    def late(name: str, data: bytes) -> None:
        theirs.take()
        put(name, data)

    monkeypatch.setattr(mine._store, "put", late)
    assert not mine._renew()
    with pytest.raises(CheckpointError, match="the run was taken over by rank 0 on node7"):
        mine.check()
    theirs.check()
    assert [holder.host for holder in written(place) if holder] == ["node7"]
    mine.release()
    theirs.release()


def test_signs_of_life_are_given(place: str) -> None:
    mine = claim(place)
    mine.take()
    wait_until(lambda: all(holder and holder.number >= 2 for holder in written(place)), lambda: written(place))
    (holder,) = written(place)
    assert holder is not None
    assert holder.written > holder.since
    mine.release()


def test_signs_of_life_go_on_after_a_disk_that_failed_for_a_moment(
    place: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lustre does this to a client that it has evicted; else another start would take the run for dead. A run that ends
    amid it ends well."""
    mine, stat = claim(place), os.stat

    def fail(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith(place):
            raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))
        return stat(path, *args, **kwargs)

    mine.take()
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        time.sleep(5 * QUICK.beat_s)
    numbers = [holder.number for holder in written(place) if holder]
    wait_until(lambda: [each.number for each in written(place) if each] > numbers, lambda: (numbers, written(place)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        mine.release()
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_claims_its_folder_and_where_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checkpoints from another run folder are refused, and then nothing is held."""
    monkeypatch.setattr(claims, "PATIENCE", QUICK)
    one, other = (tiny_run(tmp_path / name, checkpoint__url=str(tmp_path / "saved")) for name in ("one", "other"))
    first = Claims(one)
    first.take()
    with pytest.raises(RunBusy, match=r"saved/tiny: already being trained by .*/one/tiny"):
        Claims(other).take()
    assert written(str(other.folder)) == []
    first.release()
    second = Claims(other)
    second.take()
    second.release()


def test_a_run_that_saves_in_its_own_folder_has_one_claim(tmp_path: Path) -> None:
    """`checkpoint.url` is `output`, and the run's name is appended to both."""
    held = Claims(tiny_run(tmp_path, checkpoint__url=str(tmp_path)))
    held.take()
    assert len(written(str(tmp_path / "tiny"))) == 1
    held.release()
