"""Local supervisor: starts the ranks of a job on this machine and combines their exit codes.

At a terminal, rank 0 keeps the terminal (its progress line stays live); the others write to RUN/logs/rank_N.log. A
signal to the launcher reaches every rank once. When a rank fails, the others are asked to end and are killed after a
grace period; if the launcher itself is killed, the kernel kills the ranks.
"""

from __future__ import annotations

import ctypes
import os
import queue
import select
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

# Folder of DeepSpeed's compiled operators, and stale locks of killed builds.
#
# torch guards each build folder by a file named `lock`, which its builder keeps open and deletes at the end. After a
# killed build the file remains, and every later process waits for it forever without a message.

DEFAULT_FOLDER = Path(".cache") / "torch_extensions"
_GRACE_S = 10.0  # younger locks are kept: their builder may run in another container of this machine
_GRACE_UNKNOWN_S = 1800.0  # without /proc, only a lock older than any build counts as stale


def extensions_folder() -> Path:
    """Return the folder of compiled operators: TORCH_EXTENSIONS_DIR, or a cache under the current directory. Nodes of a
    cluster share that directory, but neither processors nor the sight of who holds a lock: each has a folder there."""
    own = DEFAULT_FOLDER / socket.gethostname() if "SLURM_JOB_ID" in os.environ else DEFAULT_FOLDER
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or own).resolve()


def clear_stale_locks(folder: Path, *, grace_s: float = _GRACE_S) -> list[Path]:
    """Delete the locks under `folder` that no process of this machine holds; return the deleted ones.

    Args:
        folder: root of the compiled operators, one subfolder per operator.
        grace_s: age in seconds below which a lock is never touched.
    """
    open_locks = _open_lock_files()
    limit_s = grace_s if open_locks is not None else max(grace_s, _GRACE_UNKNOWN_S)
    stale = [lock for lock in sorted(folder.glob("*/lock")) if _is_stale(lock, open_locks or set(), limit_s)]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _is_stale(lock: Path, open_locks: set[str], limit_s: float) -> bool:
    try:
        age_s = time.time() - lock.stat().st_mtime
    except FileNotFoundError:  # its builder has just finished
        return False
    return age_s >= limit_s and str(lock.resolve()) not in open_locks


def _open_lock_files() -> set[str] | None:
    """Return the operator build locks that some process has open; None without /proc."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return None
    open_locks: set[str] = set()
    for descriptors in processes.glob("[0-9]*/fd"):
        try:
            links = [os.readlink(entry) for entry in os.scandir(descriptors)]
        except OSError:  # the process has ended, or belongs to another user
            continue
        open_locks.update(link for link in links if link.endswith("/lock"))
    return open_locks


GRACE_S = 20.0  # between the request to end and the kill
# Signals to the launcher -> signal sent to the ranks. A closed terminal (SIGHUP) must not lose work.
FORWARDED = {
    **{number: number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)},
    signal.SIGHUP: signal.SIGTERM,
}
_PR_SET_PDEATHSIG = 1
_WAKE_S = 0.5  # a signal that arrives just before the main thread blocks is handled at the next wake-up
_TAIL_LINES = 15


def launch(
    command: Sequence[str],
    *,
    ranks: int,
    logs: Path,
    environment: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
) -> int:
    """Run `command` as `ranks` processes that rendezvous through RANK, WORLD_SIZE, MASTER_ADDR etc.

    Args:
        command: program and arguments, passed on literally to every rank.
        ranks: number of processes.
        logs: folder for rank_N.log of the ranks above 0; appended to.
        environment: environment of the ranks; that of this process by default.
        grace_s: seconds between the request to end and the kill.

    Returns:
        0 if every rank succeeded; 75 if every rank asks to be resumed; otherwise the exit code of the first rank that
        failed (128+n if signal n ended it), or TrainingError's if some finished and some ask to be resumed.
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
    """Run `command` as the ranks of this machine until all have ended.

    Args:
        command: program and arguments, passed on literally to every rank.
        environments: complete environment of each rank, by rank.
        logs: folder for rank_N.log; appended to.
        grace_s: seconds between the request to end and the kill.
        terminal: rank 0 prints to this process's output instead of a log.
    """
    for lock in clear_stale_locks(extensions_folder()):
        print(f"deleted the lock of a killed build: {lock}", file=sys.stderr)
    job = _Job(grace_s=grace_s, logs=logs, terminal=terminal)
    with job.forwarding_signals():
        try:
            for rank, environment in environments.items():
                job.start(command, rank, environment)
            return JobExit(job.wait(), dict(job.codes), tuple(each.name for each in job.signals))
        finally:
            job.kill()


class JobExit(NamedTuple):
    """Result of a job: combined exit code (see `launch`), exit code of each rank in order of their end, and the signals
    sent to them."""

    code: int
    codes: dict[int, int]
    signals: tuple[str, ...]


def rank_environments(base: Mapping[str, str], ranks: int) -> dict[int, dict[str, str]]:
    """Return the environment of each of `ranks` processes that rendezvous on this machine."""
    port = _free_port()
    ranks_info = [RankInfo(rank, ranks, rank) for rank in range(ranks)]
    variables = [rank_variables(info, local_world_size=ranks, address="127.0.0.1", port=port) for info in ranks_info]
    return {rank: {**base, **own} for rank, own in enumerate(variables)}


def rank_environment(inherited: Mapping[str, str], ranks: int) -> dict[str, str]:
    """Return the environment that all ranks of this machine share: a share of its cores, large heap pages (fewer page
    faults where the system grants them: docs/performance.md), and the folder of compiled operators."""
    common = dict(inherited)
    common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    common.setdefault("GLOO_SOCKET_IFNAME", "lo")
    common.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return program_environment(common)


def program_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that every process of a job needs: nothing is imported from the current folder, and rank
    variables come only from the launcher."""
    common = with_safe_path(without_ranks(inherited))
    common.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    common.setdefault("PYTHONUNBUFFERED", "1")  # the log must be complete if the rank is killed
    programs = str(Path(sys.executable).parent)  # ninja, for DeepSpeed, is beside the interpreter
    return common | {"PATH": os.pathsep.join([programs, common.get("PATH", os.defpath)])}


@dataclass
class _Job:
    """The started ranks and their exit codes."""

    grace_s: float
    logs: Path
    terminal: bool = False
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)  # in order of their end
    ended: queue.Queue[tuple[int, int]] = field(default_factory=queue.Queue)
    interrupts: int = 0
    signals: list[signal.Signals] = field(default_factory=list)  # signals for every rank
    num_sent: dict[int, int] = field(default_factory=dict)  # number of those sent to each rank

    def start(self, command: Sequence[str], rank: int, environment: Mapping[str, str]) -> None:
        output = self._open_log(rank, command)
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,  # Ctrl-C at the terminal reaches the ranks through the launcher, once
            preexec_fn=die_with(os.getpid()),
        )
        if output:
            output.close()
        self.num_sent[rank] = 0
        self.processes[rank] = process
        self._deliver()  # signals that arrived during its start

    def wait(self) -> int:
        """Block until every rank has ended; return the job's exit code."""
        for rank, process in self.processes.items():  # not earlier: a fork beside running threads could deadlock
            threading.Thread(target=self._wait_for_rank, args=(rank, process), daemon=True).start()
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
                self._print(f"killing ranks that did not end within {self.grace_s:.0f} s: {self._running()}")
                self.kill()
                deadline_s = None
                continue
            self.codes[rank] = code = returned if returned >= 0 else 128 - returned
            if code not in (EXIT_OK, EXIT_RESUME) and deadline_s is None and self._running():
                self._print(f"rank {rank} {_describe_end(returned)}; ending the other ranks")
                self._send(signal.SIGTERM)
                deadline_s = time.monotonic() + self.grace_s
        return self._combined_code()

    def _wait_for_rank(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.ended.put((rank, process.wait()))

    def kill(self) -> None:
        """Kill every running rank with its process group."""
        for rank in self._running():
            _send_to_group(self.processes[rank].pid, signal.SIGKILL)

    def _kill_stopped(self) -> None:
        """Kill ranks that are stopped by SIGSTOP: they cannot react to a request to end."""
        for rank in self._running():
            if _is_stopped(self.processes[rank].pid):
                self._print(f"rank {rank} is stopped; killing it")
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
            self.kill()  # second Ctrl-C: now, without saving
        else:
            self._send(FORWARDED[signal.Signals(number)])

    def _send(self, number: signal.Signals) -> None:
        self.signals.append(number)
        self._deliver()

    def _deliver(self) -> None:
        """Send every rank its outstanding signals. A signal handler may interrupt this: counting first prevents
        sending a signal twice."""
        for rank in self._running():
            while self.num_sent[rank] < len(self.signals):
                self.num_sent[rank] += 1
                self.processes[rank].send_signal(self.signals[self.num_sent[rank] - 1])

    def _running(self) -> list[int]:
        return [rank for rank, process in list(self.processes.items()) if process.returncode is None]

    def _combined_code(self) -> int:
        failed = [(rank, code) for rank, code in self.codes.items() if code not in (EXIT_OK, EXIT_RESUME)]
        if failed:
            rank, code = failed[0]
            self._print(f"rank {rank} failed first, with exit code {code}{self._tail(rank)}")
            return code
        if len(set(self.codes.values())) == 1:
            return next(iter(self.codes.values()))
        self._print(f"some ranks finished, others ask to be resumed: {dict(sorted(self.codes.items()))}")
        return TrainingError.exit_code

    def _open_log(self, rank: int, command: Sequence[str]) -> IO[bytes] | None:
        if rank == 0 and self.terminal:
            return None
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            log = self._log(rank).open("ab", buffering=0)
        except OSError as error:
            self._print(f"warning: rank {rank} prints here, because its log cannot be written: {error}")
            return None
        with suppress(OSError):  # on a full disk the log may stay empty
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
        return log

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def _tail(self, rank: int) -> str:
        if rank == 0 and self.terminal:
            return ""
        try:
            lines = self._log(rank).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        except OSError:  # there is no log: it printed to the terminal
            return ""
        return "\n".join([f"; {self._log(rank)} ends with:", *(f"  | {line}" for line in lines)])

    def _print(self, text: str) -> None:
        print(f"launcher: {text}", file=sys.stderr, flush=True)


def _describe_end(returned: int) -> str:
    return f"ended with exit code {returned}" if returned >= 0 else f"was ended by {signal.Signals(-returned).name}"


def _is_stopped(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended meanwhile
        return False
    return stat.rpartition(")")[2].split()[0] in "Tt"


def _send_to_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:  # it has ended meanwhile
        return


def _free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with(parent: int) -> Callable[[], None]:
    """Return the function a new rank runs first: the kernel kills the rank when the launcher is gone, however it
    ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the launcher ended before the call above
            os._exit(1)

    return prepare


def end_with(process: int) -> None:
    """Kill this process, and with it its ranks, as soon as another one of this machine ends that is not its parent.
    Linux before 5.3 cannot tell, and nothing happens."""
    try:
        watched = os.pidfd_open(process)
    except (AttributeError, OSError):
        return

    def follow() -> None:
        select.select([watched], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


# `regen train` on this machine: the config is validated here, before any rank starts.


def train_locally(config: Path, overrides: Sequence[str], *, ranks: int, fresh: bool = False) -> int:
    """Train `config` on `ranks` processes of this machine; return their exit code (see `launch`).

    Raises:
        ConfigError: the config is invalid or incompatible with this number of ranks.
        RunBusy: another process is training this run.
    """
    from regen_dist.checkpoint.claims import Claims
    from regen_dist.config import load_config
    from regen_dist.config.identity import clips_per_rank

    checked = load_config(config, overrides)
    clips_per_rank(checked, ranks)
    Claims(checked).refuse_if_taken()
    command = regen("train", *(["--fresh"] if fresh else []), str(config), *overrides)
    return launch(command, ranks=ranks, logs=checked.folder / "logs")
