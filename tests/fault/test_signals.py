"""Signals that reach one rank of two: both stop at the same step, save together, and ask to be resumed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.observe.record import read_record
from tests.fault.conftest import losses
from tests.helpers.checkpoints import folder_of, newest
from tests.helpers.machine import descendants
from tests.helpers.ranks import run_ranks, run_regen_ranks, said, start_regen, wait_for_step
from tests.helpers.tiny import tiny_dataset, tiny_run

RESUME = 75
STEPS, ENDLESS = 40, 100_000
STOP = 5  # the step at which a scripted signal comes
SLOW_S = 0.3  # each phase of a save that is disturbed


class Script(NamedTuple):
    """A run, and the signals that ranks send themselves: `at_stop` (rank, signal) after step `STOP`; while a checkpoint
    is written, one at each of the phases in `saving`, on every rank."""

    config: EmbedderConfig
    at_stop: tuple[int, signal.Signals] | None
    saving: Mapping[str, signal.Signals] = {}


def _play(scripts: list[Script]) -> list[int]:
    """Train one run after the other as a rank; return their exit codes."""
    from regen_dist.distributed.ranks import process_group, read_environment
    from regen_dist.training import run

    ranks = read_environment()
    run.process_group = lambda ranks, needed: nullcontext()  # type: ignore[assignment,misc]
    codes = []
    with process_group(ranks, needed=True):
        for script in scripts:
            with pytest.MonkeyPatch.context() as patch:
                _rewrite(patch, script, ranks.rank)
                codes.append(run.train(script.config))
    return codes


def _rewrite(patch: pytest.MonkeyPatch, script: Script, rank: int) -> None:
    from regen_dist.checkpoint.saver import Saver
    from regen_dist.training.loop import Trainer

    train_step, build = Trainer.train_step, Saver.__init__

    def step(self: Trainer) -> Any:
        found = train_step(self)
        if script.at_stop is not None and (self.step, rank) == (STOP, script.at_stop[0]):
            os.kill(os.getpid(), script.at_stop[1])
        return found

    def slow(self: Saver, *arguments: Any, **others: Any) -> None:
        build(self, *arguments, **others)
        told = self._phase

        def phase(name: str) -> None:
            told(name)
            if name in script.saving:  # first the signal: later, the next save may be due before it is heard
                os.kill(os.getpid(), script.saving[name])
                time.sleep(SLOW_S)

        self._phase = phase

    patch.setattr(Trainer, "train_step", step)
    patch.setattr(Saver, "__init__", slow)


AGAIN = {"shard": signal.SIGTERM, "vote": signal.SIGUSR1, "manifest": signal.SIGINT, "pointer": signal.SIGUSR2}
SCRIPTS: dict[str, tuple[tuple[int, signal.Signals] | None, dict[str, signal.Signals], int]] = {
    "usr1_to_rank_0": ((0, signal.SIGUSR1), {}, ENDLESS),
    "usr2_to_rank_1": ((1, signal.SIGUSR2), {}, ENDLESS),
    "term_and_more_while_saving": ((1, signal.SIGTERM), AGAIN, ENDLESS),
    "while_a_thread_saves": (None, AGAIN, STOP),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted runs, by one start of two ranks under ZeRO-3; all of them ask to be resumed."""
    folder = tmp_path_factory.mktemp("signals")
    data = tiny_dataset(folder / "data")
    scripts = [
        Script(
            tiny_run(
                folder, data, name=name, engine__kind="zero3", train__steps=STEPS, checkpoint__every=every,
                train__trace_samples=True,
            ),
            at_stop, saving,
        )
        for name, (at_stop, saving, every) in SCRIPTS.items()
    ]  # fmt: skip
    assert run_ranks(_play, 2, scripts, timeout_s=240.0) == [[RESUME] * len(scripts)] * 2
    return folder


def _assert_saved_at_its_end(run: Path) -> int:
    """Both ranks made the same steps, and the last of them is saved, whole, with nothing left over. Returns it."""
    made = len(losses(run))
    for rank in range(2):
        notes = read_record(run / "samples" / f"rank-{rank:05d}.jsonl", "samples")
        assert [line["step"] for line in notes] == list(range(1, made + 1))
    folder = folder_of(run)
    assert newest(run).step == folder.pointer() == made
    assert newest(run).world_size == 2
    assert folder.debris() == {}
    assert [path.name for path in (run / "checkpoints").glob(".*")] == []
    return made


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("usr1_to_rank_0", "SIGUSR1"),
        ("usr2_to_rank_1", "another rank"),
        ("term_and_more_while_saving", "SIGTERM"),  # rank 0 has been sent one by then
    ],
)
def test_one_rank_alone_stops_both(folder: Path, name: str, reason: str) -> None:
    """At the step boundary where the signal is known, with one committed checkpoint. That a second, a third and a
    fourth signal come to every rank while it is written, in each of its phases, changes nothing."""
    assert _assert_saved_at_its_end(folder / name) == STOP
    assert folder_of(folder / name).steps() == [STOP]
    events = [line["event"] for line in read_record(folder / name / "metrics.jsonl", "event")]
    assert events[-1] == f"stopped by {reason} after step {STOP}: run it again to go on"


def test_signals_while_a_thread_saves(folder: Path) -> None:
    """Training goes on beside it: the save in flight is committed, and then that of the step at which all stop."""
    last = _assert_saved_at_its_end(folder / "while_a_thread_saves")
    assert STOP < last < STEPS
    assert folder_of(folder / "while_a_thread_saves").steps() == [STOP, last]


def _rank_process(launcher: int, rank: int) -> int:
    """The process id of a rank of `regen train --ranks`."""
    (found,) = [
        child
        for child in descendants(launcher)
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]
    return found


def test_sigterm_to_the_process_of_one_rank_and_a_time_limit(config: Path) -> None:
    """Exit code 75 on the command line after a signal to the process of rank 1 alone; the same command with a time
    limit goes on from there, saves when the time is up, and ends with 75 again."""
    run, log = config.parent / "runs" / "one_signal", config.with_name("one_signal.log")
    command = ["train", config, "--ranks", 2, "name=one_signal", "train.trace_samples=true"]
    command += [f"train.steps={ENDLESS}", f"checkpoint.every={ENDLESS}"]
    process = start_regen(*command, log=log)
    try:
        wait_for_step(run, 2, process)
        os.kill(_rank_process(process.pid, 1), signal.SIGTERM)
        assert process.wait(60) == RESUME
    finally:
        process.kill()
    stopped = _assert_saved_at_its_end(run)
    assert folder_of(run).steps() == [stopped]
    assert f"stopped by another rank after step {stopped}: run it again to go on" in log.read_text()
    limit = ["train.time_limit_s=1.5", "train.time_limit_lead_s=0.5"]
    logs = config.with_name("time_limit")
    again = [part for part in command if part not in ("--ranks", 2)]
    assert run_regen_ranks(*again, *limit, logs=logs) == [RESUME, RESUME]
    last = _assert_saved_at_its_end(run)
    assert stopped < last < ENDLESS
    told, _ = said(logs)
    assert f"resumed at step {stopped} on 2 rank(s)" in told
    assert f"stopped by the time limit of 1.5 s after step {last}: run it again" in told
