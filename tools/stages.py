"""Common parts of programs that run the user's commands in sequence and interrupt a training once on purpose."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import typer

from regen_dist.distributed.environment import without_ranks
from regen_dist.errors import EXIT_OK, EXIT_RESUME
from regen_dist.programs import regen

_POLL_S = 0.5


class StageExit(NamedTuple):
    """Exit code of a command, and whether it was stopped only by this program's own request."""

    code: int
    on_purpose: bool


def working_precision() -> str:
    """Return `engine.precision` for this machine: bf16 takes hours on a CPU without native bf16 multiplication."""
    import torch

    from regen_dist.observe.hardware import has_native_bf16

    return "bf16" if torch.cuda.is_available() or has_native_bf16() else "fp32"


def run(arguments: Sequence[str]) -> None:
    """Print and run one `regen` command, as `run_until` does; if it fails, exit with its exit code."""
    announce(arguments)
    if code := run_until(arguments, Path(), None).code:
        raise typer.Exit(code)


def announce(arguments: Sequence[str]) -> None:
    """Print a command as a user would type it."""
    print(f"\n$ regen {shlex.join(arguments)}", flush=True)


def run_program(
    program: Sequence[str],
    *,
    log: Path | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Where this program is killed, it ends with it.

    Args:
        program: command line.
        log: file of its output; None: it is captured.
        folder: folder in which it runs; None: this program's own.
        environment: its environment; None: this program's own.
    """
    from launcher.supervise import die_with

    own = without_ranks(os.environ if environment is None else environment)
    with nullcontext(subprocess.PIPE) if log is None else log.open("wb") as output:
        return subprocess.run(
            program, env=own, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True,
            check=False, preexec_fn=die_with(os.getpid()),
        )  # fmt: skip


def run_until(
    arguments: Sequence[str], training: Path, stop_at: int | None, environment: Mapping[str, str] | None = None
) -> StageExit:
    """Run a command; once the record of its training reaches a step, ask that training to stop.

    Signals to this program are forwarded to the command, which saves and ends. Where this program is killed, the
    command ends with it. The exit code is 128 + n where signal n ended the command, and 75 where a signal came too late
    for it.

    Args:
        arguments: arguments of `regen`.
        training: folder of the run.
        stop_at: step at which to stop; None: never.
        environment: environment of the command; None: this program's own.
    """
    inherited = without_ranks(os.environ if environment is None else environment)
    asked = False
    with _started(regen(*arguments), inherited) as (process, signals):
        while process.poll() is None:
            time.sleep(_POLL_S)
            if stop_at is not None and not asked and last_step(training) >= stop_at:
                (training / "STOP").touch()
                asked = True
    code = process.returncode or (EXIT_RESUME if signals else EXIT_OK)
    return StageExit(code if code >= 0 else 128 - code, asked and not signals)


def run_stopping_once(
    arguments: Sequence[str], training: Path, stop_at: int | None, environment: Mapping[str, str] | None = None
) -> None:
    """Print and run a command whose training is stopped at a step on purpose, and once more, to resume. If it fails,
    exit with its exit code. The arguments are those of `run_until`."""
    announce(arguments)
    ended = run_until(arguments, training, stop_at, environment)
    if ended.code == EXIT_RESUME and ended.on_purpose:
        print(f"Stopped half-way on purpose (exit code {EXIT_RESUME}). The same command resumes:", flush=True)
        announce(arguments)
        ended = run_until(arguments, training, None, environment)
    if ended.code:
        raise typer.Exit(ended.code)


@contextmanager
def _started(
    program: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """Start a command in a session of its own and forward the signals of this program to it, as the launcher forwards
    them to ranks, also those that come while it starts; yield its process and the signals received."""
    from launcher.supervise import FORWARDED, die_with

    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []
    came: list[int] = []

    def forward_signal(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if process is None:
            early.append(number)
        else:
            process.send_signal(FORWARDED[signal.Signals(number)])

    wanted = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup ignores SIGHUP
    ]
    before = {number: signal.signal(number, forward_signal) for number in wanted}
    try:
        process = subprocess.Popen(
            program,
            env=environment,
            start_new_session=True,  # one signal instead of two
            preexec_fn=die_with(os.getpid()),
        )
        for number in early:
            process.send_signal(FORWARDED[signal.Signals(number)])
        yield process, came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_step(training: Path) -> int:
    """Return the newest step in the record of a run; 0 before the first."""
    return max((line["step"] for line in _record(training) if line["kind"] == "train"), default=0)


def was_resumed(training: Path) -> bool:
    """Return whether a run has resumed from a checkpoint."""
    return any(line.get("event") == "start" and line["step"] > 0 for line in _record(training))


def _record(training: Path) -> list[dict[str, Any]]:
    from regen_dist.observe.record import read_record

    path = training / "metrics.jsonl"
    return read_record(path) if path.is_file() else []
