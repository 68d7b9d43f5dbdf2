"""Starts the ranks of one job on this machine, and sees them through to one exit code.

At a terminal rank 0 keeps it (its progress line stays live); the others write to RUN/logs/rank_N.log. A signal that
reaches the launcher reaches every rank once. When a rank fails the others are asked to end, and after a grace period
made to; when the launcher itself is killed, the kernel kills the ranks.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from regen_dist.distributed.environment import RankInfo, rank_variables, without_ranks
from regen_dist.errors import EXIT_OK, EXIT_RESUME, TrainingError
from regen_dist.programs import regen, with_safe_path

# Where DeepSpeed's compiled operators live, and the locks that a killed build leaves there.
#
# torch guards each build folder with a file named `lock`, which its builder keeps open and deletes at the end. A
# builder that is killed leaves the file, and every later process waits for it without a word and without an end.

DEFAULT_FOLDER = Path(".cache") / "torch_extensions"
_GRACE_S = 10.0  # younger locks are left alone: their builder may live in another container of this machine
_GRACE_UNKNOWN_S = 1800.0  # where /proc cannot tell who builds, only a lock older than any build is taken for dead


def extensions_folder() -> Path:
    """The folder of compiled operators: TORCH_EXTENSIONS_DIR, or a cache of the project under the current directory."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or DEFAULT_FOLDER).resolve()


def clear_stale_locks(folder: Path, *, grace_s: float = _GRACE_S) -> list[Path]:
    """Delete the locks under `folder` that no process of this machine holds; returns those that were deleted.

    Args:
        folder: root of the compiled operators, one subfolder an operator.
        grace_s: age in seconds below which a lock is never touched.
    """
    held = _files_held_open()
    limit_s = grace_s if held is not None else max(grace_s, _GRACE_UNKNOWN_S)
    stale = [lock for lock in sorted(folder.glob("*/lock")) if _is_stale(lock, held or set(), limit_s)]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _is_stale(lock: Path, held: set[str], limit_s: float) -> bool:
    try:
        age_s = time.time() - lock.stat().st_mtime
    except FileNotFoundError:  # its builder has just finished
        return False
    return age_s >= limit_s and str(lock.resolve()) not in held


def _files_held_open() -> set[str] | None:
    """Paths under a folder of compiled operators that some process has open; None where /proc cannot tell."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return None
    held: set[str] = set()
    for descriptors in processes.glob("[0-9]*/fd"):
        try:
            links = [os.readlink(entry) for entry in os.scandir(descriptors)]
        except OSError:  # the process has ended, or belongs to another user
            continue
        held.update(link for link in links if link.endswith("/lock"))
    return held


GRACE_S = 20.0  # between asking a rank to end and killing it
# What the launcher is told, and what it tells the ranks. A terminal that closes (SIGHUP) is no reason to lose work.
FORWARDED = {
    **{number: number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)},
    signal.SIGHUP: signal.SIGTERM,
}
_PR_SET_PDEATHSIG = 1
_WAKE_S = 0.5  # a signal that comes just before the main thread blocks is handled when it wakes: never wait for ever
_TAIL_LINES = 15


def launch(
    command: Sequence[str],
    *,
    ranks: int,
    logs: Path,
    environment: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
) -> int:
    """Run `command` as `ranks` processes that find each other through RANK, WORLD_SIZE, MASTER_ADDR and their kin.

    Args:
        command: program and arguments, passed on literally to every rank.
        ranks: number of processes.
        logs: folder for rank_N.log of the ranks above 0; appended to.
        environment: what the ranks inherit; this process's own environment by default.
        grace_s: seconds between asking a rank to end and killing it.

    Returns:
        0 when every rank ended well; 75 when every rank asks to be resumed; otherwise the code of the first rank that
        failed (128+n where signal n ended it), or TrainingError's where some finished and some ask to be resumed.
    """
    base = rank_environment(os.environ if environment is None else environment, ranks)
    return supervise(command, rank_environments(base, ranks), logs=logs, grace_s=grace_s, terminal=True).code


def supervise(
    command: Sequence[str],
    environments: Mapping[int, Mapping[str, str]],
    *,
    logs: Path,
    grace_s: float = GRACE_S,
    terminal: bool = False,
) -> JobExit:
    """Run `command` as the ranks of this machine, and see them through.

    Args:
        command: program and arguments, passed on literally to every rank.
        environments: the whole environment of each rank, by its number.
        logs: folder for rank_N.log; appended to.
        grace_s: seconds between asking a rank to end and killing it.
        terminal: rank 0 prints where this process does, not to a log.
    """
    for lock in clear_stale_locks(extensions_folder()):
        print(f"deleted the lock of a build that was killed: {lock}", file=sys.stderr)
    job = _Job(grace_s=grace_s, logs=logs, terminal=terminal)
    with job.forwarding_signals():
        try:
            for rank, environment in environments.items():
                job.start(command, rank, environment)
            return JobExit(job.wait(), dict(job.codes), tuple(each.name for each in job.told))
        finally:
            job.kill()


class JobExit(NamedTuple):
    """How a job ended: its one code (see `launch`), that of each rank in the order in which they ended, and the signals
    that they were sent."""

    code: int
    codes: dict[int, int]
    told: tuple[str, ...]


def rank_environments(base: Mapping[str, str], ranks: int) -> dict[int, dict[str, str]]:
    """The environment of each of `ranks` processes that meet on this machine."""
    port = _free_port()
    places = [RankInfo(rank, ranks, rank) for rank in range(ranks)]
    told = [rank_variables(place, local_world_size=ranks, address="127.0.0.1", port=port) for place in places]
    return {rank: {**base, **variables} for rank, variables in enumerate(told)}


def rank_environment(inherited: Mapping[str, str], ranks: int) -> dict[str, str]:
    """What all ranks of this machine have in common: a share of its cores, large pages for their heaps (where the
    system gives them on request, they save faults: docs/performance.md), and the folder of compiled operators."""
    common = dict(inherited)
    common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    common.setdefault("GLOO_SOCKET_IFNAME", "lo")
    common.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return program_environment(common)


def program_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What every process of a job needs, wherever it runs: that it imports nothing from the current folder, and is told
    of its rank by nobody but us, among other things."""
    common = with_safe_path(without_ranks(inherited))
    common.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    common.setdefault("PYTHONUNBUFFERED", "1")  # a log must be complete when its rank is killed
    programs = str(Path(sys.executable).parent)  # ninja, for DeepSpeed, lives beside the interpreter
    return common | {"PATH": os.pathsep.join([programs, common.get("PATH", os.defpath)])}


@dataclass
class _Job:
    """The ranks that were started, and how they ended."""

    grace_s: float
    logs: Path
    terminal: bool = False
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)  # in the order in which the ranks ended
    ended: queue.Queue[tuple[int, int]] = field(default_factory=queue.Queue)
    interrupts: int = 0
    told: list[signal.Signals] = field(default_factory=list)  # what all ranks must hear, and
    heard: dict[int, int] = field(default_factory=dict)  # how much of it each has been sent

    def start(self, command: Sequence[str], rank: int, environment: Mapping[str, str]) -> None:
        output = self._open_log(rank, command)
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,  # so that the terminal's Ctrl-C reaches the ranks through us, once
            preexec_fn=die_with(os.getpid()),
        )
        if output:
            output.close()
        self.heard[rank] = 0
        self.processes[rank] = process
        self._deliver()  # a signal that came while it started

    def wait(self) -> int:
        """Block until every rank has ended, then give the job's exit code."""
        for rank, process in self.processes.items():  # only now: a fork beside running threads could deadlock
            threading.Thread(target=self._await, args=(rank, process), daemon=True).start()
        deadline_s: float | None = None
        while len(self.codes) < len(self.processes):
            left_s = _WAKE_S if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            try:
                rank, returned = self.ended.get(timeout=min(left_s, _WAKE_S))
            except queue.Empty:
                if deadline_s is not None:
                    self._kill_stopped()
                if deadline_s is None or time.monotonic() < deadline_s:
                    continue
                self._say(f"killing the ranks that did not end within {self.grace_s:.0f} s: {self._running()}")
                self.kill()
                deadline_s = None
                continue
            self.codes[rank] = code = returned if returned >= 0 else 128 - returned
            if code not in (EXIT_OK, EXIT_RESUME) and deadline_s is None and self._running():
                self._say(f"rank {rank} {_ending(returned)}; ending the other ranks")
                self._send(signal.SIGTERM)
                deadline_s = time.monotonic() + self.grace_s
        return self._verdict()

    def _await(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.ended.put((rank, process.wait()))

    def kill(self) -> None:
        """End every rank that still runs, with what it started."""
        for rank in self._running():
            _send_to_group(self.processes[rank].pid, signal.SIGKILL)

    def _kill_stopped(self) -> None:
        """End the ranks that SIGSTOP has stopped: they cannot hear that they were asked to end."""
        for rank in self._running():
            if _is_stopped(self.processes[rank].pid):
                self._say(f"rank {rank} is stopped; killing it")
                _send_to_group(self.processes[rank].pid, signal.SIGKILL)

    @contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        wanted = [
            number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN
        ]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, self._forward) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1 and number == signal.SIGINT:
            self.kill()  # asked twice from the keyboard: now, without saving
        else:
            self._send(FORWARDED[signal.Signals(number)])

    def _send(self, number: signal.Signals) -> None:
        self.told.append(number)
        self._deliver()

    def _deliver(self) -> None:
        """Send every rank what it has not been sent yet. A handler may interrupt this: counted first, nothing is sent
        twice."""
        for rank in self._running():
            while self.heard[rank] < len(self.told):
                self.heard[rank] += 1
                self.processes[rank].send_signal(self.told[self.heard[rank] - 1])

    def _running(self) -> list[int]:
        return [rank for rank, process in list(self.processes.items()) if process.returncode is None]

    def _verdict(self) -> int:
        failed = [(rank, code) for rank, code in self.codes.items() if code not in (EXIT_OK, EXIT_RESUME)]
        if failed:
            rank, code = failed[0]
            self._say(f"rank {rank} failed first, with exit code {code}{self._tail(rank)}")
            return code
        if len(set(self.codes.values())) == 1:
            return next(iter(self.codes.values()))
        self._say(f"some ranks finished and some ask to be resumed: {dict(sorted(self.codes.items()))}")
        return TrainingError.exit_code

    def _open_log(self, rank: int, command: Sequence[str]) -> IO[bytes] | None:
        if rank == 0 and self.terminal:
            return None
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            log = self._log(rank).open("ab", buffering=0)
        except OSError as error:
            self._say(f"warning: rank {rank} prints here, for its log cannot be written: {error}")
            return None
        with suppress(OSError):  # on a full disk the log begins with what there is room for
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
        return log

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def _tail(self, rank: int) -> str:
        if rank == 0 and self.terminal:
            return ""
        try:
            lines = self._log(rank).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        except OSError:  # it printed here
            return ""
        return "\n".join([f"; {self._log(rank)} ends with:", *(f"  | {line}" for line in lines)])

    def _say(self, text: str) -> None:
        print(f"launcher: {text}", file=sys.stderr, flush=True)


def _ending(returned: int) -> str:
    return f"ended with exit code {returned}" if returned >= 0 else f"was ended by {signal.Signals(-returned).name}"


def _is_stopped(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it ended by itself meanwhile
        return False
    return stat.rpartition(")")[2].split()[0] in "Tt"


def _send_to_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:  # it ended by itself meanwhile
        return


def _free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with(parent: int) -> Callable[[], None]:
    """What a new rank does first: ask the kernel to kill it when the launcher is gone, however that ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the launcher ended before the line above
            os._exit(1)

    return prepare


# Training on this machine: the config is checked here, before any rank starts.


def train_locally(config: Path, overrides: Sequence[str], *, ranks: int, fresh: bool = False) -> int:
    """Train `config` on `ranks` processes of this machine; returns their exit code (see `launcher.supervise.launch`).

    Raises:
        ConfigError: the config is wrong, or does not fit this number of ranks.
        RunBusy: another process trains this run.
    """
    from regen_dist.checkpoint.claims import Claims
    from regen_dist.config import load_config
    from regen_dist.config.identity import clips_per_rank

    checked = load_config(config, overrides)
    clips_per_rank(checked, ranks)
    Claims(checked).refuse_if_taken()
    command = regen("train", *(["--fresh"] if fresh else []), str(config), *overrides)
    return launch(command, ranks=ranks, logs=checked.folder / "logs")
