"""Real ranks on this machine for tests, and `regen` commands in ranks that begin with everything imported."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from launcher.supervise import rank_environment, rank_environments
from regen_dist.config import AnyRunConfig
from regen_dist.data.pool import end_with_parent
from regen_dist.distributed.environment import without_ranks
from regen_dist.observe.record import read_record
from tests.helpers.rank_server import RankContext, check_server


class Job(NamedTuple):
    """One run for `train_jobs`: its config, and after how many steps of this start it is asked to stop.

    With 0 steps it is not trained: the result is this rank's master weights at the start, as numpy arrays.
    """

    config: AnyRunConfig
    stop_after: int | None = None


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 150.0) -> list[Any]:
    """Call `function(*args)` in `world_size` new processes that form one job; returns each rank's result.

    Function, arguments and results must pickle; send tensors as numpy arrays. When a rank fails or time is up, every
    rank is killed by its process id, and the failure is raised here with the rank's traceback.
    """
    with start_ranks(function, world_size, *args) as started:
        return started.results(timeout_s)


def start_ranks(function: Callable[..., Any], world_size: int, *args: Any, logs: Path | None = None) -> Started:
    """The same without waiting for the end: a handle to look at the ranks, and to kill them. Use it in a `with`.

    Args:
        function: called in every rank.
        world_size: number of ranks.
        args: of the function.
        logs: folder for what each rank prints, `rank_N.log`, written anew; by default it goes where this process's
            output goes.
    """
    with _one_start_at_a_time:
        return _start_ranks(function, world_size, args, logs)


_one_start_at_a_time = threading.Lock()  # a start changes this process's environment for a moment


def _start_ranks(function: Callable[..., Any], world_size: int, args: tuple[Any, ...], logs: Path | None) -> Started:
    context = RankContext()
    environments = rank_environments(rank_environment(os.environ, world_size), world_size)
    started = Started()
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            environment = environments[rank]
            log = None if logs is None else logs / f"rank_{rank}.log"
            # No daemon, which may have no workers of its own; it ends with this process all the same.
            process = context.Process(target=_rank, args=(sender, environment, log, function, args), daemon=False)
            process.start()
            sender.close()  # the rank's own end is what must close when it dies
            started.processes.append(process)
            started.receivers.append(receiver)
    except BaseException:
        started.kill()
        raise
    return started


class Started:
    """Ranks that were started, at `began` (seconds of the clock). Its `with` block ends them."""

    def __init__(self) -> None:
        self.began = time.time()
        self.processes: list[BaseProcess] = []
        self.receivers: list[Connection] = []

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pids(self) -> list[int]:
        """The process id of every rank."""
        return [process.pid for process in self.processes if process.pid is not None]

    @property
    def running(self) -> list[int]:
        """The ranks that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def results(self, timeout_s: float = 150.0, *, codes: bool = False) -> list[Any]:
        """Wait for what every rank returns.

        Args:
            timeout_s: for all of them.
            codes: the results are exit codes; a rank that ended by itself with one has it as its result.

        Raises:
            RuntimeError: a rank failed (with its traceback), or ended without a result.
            TimeoutError: time was up.
        """
        return _collect(self.receivers, timeout_s, self.processes if codes else None)

    def exit_codes(self, timeout_s: float = 60.0) -> list[int]:
        """Wait until every rank has ended, however it did. Exit codes: 0 when it returned a result, 1 when it raised,
        negative when a signal ended it.

        Raises:
            TimeoutError: time was up.
        """
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.running:
            raise TimeoutError(f"after {timeout_s:.0f} s the ranks {self.running} run")
        return [process.exitcode or 0 for process in self.processes]

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """End ranks by SIGKILL, by default all that still run, and wait until they are gone."""
        chosen = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        for process in chosen:
            process.kill()
        for process in chosen:
            process.join()


def _collect(
    receivers: Sequence[Connection], timeout_s: float, ended: Sequence[BaseProcess] | None = None
) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(
                f"after {timeout_s:.0f} s the ranks {sorted(set(range(len(receivers))) - set(results))} run"
            )
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                ended_well, results[rank] = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                code = None if ended is None else _exit_code(ended[rank])
                if code is None or code < 0:
                    raise RuntimeError(f"rank {rank} ended without a result") from None
                ended_well, results[rank] = True, code
            if not ended_well:
                raise RuntimeError(f"rank {rank} failed:\n{results[rank]}")
    return [results[rank] for rank in range(len(receivers))]


def _exit_code(process: BaseProcess) -> int | None:
    process.join(10.0)
    return process.exitcode


def _rank(
    sender: Connection,
    environment: dict[str, str],
    log: Path | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    gc.freeze()  # what the server imported is no garbage: a collection would touch, and so copy, all of its pages
    os.environ.clear()  # that of the server is as old as the server
    os.environ.update(environment)
    end_with_parent()
    try:
        check_server()
        if log is not None:
            _print_to(log)
        sender.send((True, function(*args)))
    except BaseException as error:
        traceback.print_exc()
        with suppress(BrokenPipeError):  # the parent has given up on this rank
            sender.send((False, traceback.format_exc()))
        raise SystemExit(1) from error
    finally:
        sender.close()


def _print_to(log: Path) -> None:
    """All that this process and its libraries print."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # complete when the rank is killed


def start_regen(*arguments: object, log: Path) -> subprocess.Popen[bytes]:
    """Start `regen ARGUMENTS` as a process of its own; all that it prints goes to `log`."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tools.cli", *map(str, arguments)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def run_regen(*arguments: object, log: Path, timeout_s: float = 120.0) -> int:
    """`regen ARGUMENTS` to its end; returns its exit code."""
    process = start_regen(*arguments, log=log)
    try:
        return process.wait(timeout_s)
    finally:
        process.kill()


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes], timeout_s: float = 120.0) -> None:
    """Block until a run has logged `step`; fails when its process ends before."""
    deadline = time.monotonic() + timeout_s
    record = run / "metrics.jsonl"
    while not (record.exists() and any(line["step"] >= step for line in read_record(record, "train"))):
        assert process.poll() is None, f"it ended with exit code {process.returncode} before step {step}"
        assert time.monotonic() < deadline, f"it did not reach step {step} in {timeout_s:.0f} s"
        time.sleep(0.005)  # tiny runs make their last step soon after


def train_jobs(jobs: Sequence[Job]) -> list[Any]:
    """Train one run after the other, as a rank of `run_ranks`; return their exit codes.

    All of them share one process group, because DeepSpeed does not survive that its group is left and joined again.
    """
    from regen_dist.distributed.ranks import process_group, read_environment
    from regen_dist.training import run

    results: list[Any] = []
    ranks, stopper = read_environment(), run.Stopper
    run.process_group = lambda ranks, needed: nullcontext()  # type: ignore[assignment,misc]
    with process_group(ranks, needed=True):
        for job in jobs:
            run.Stopper = _stopper_after(stopper, job.stop_after)  # type: ignore[misc]
            results.append(_starting_masters(job.config, ranks) if job.stop_after == 0 else run.train(job.config))
    return results


def _starting_masters(config: AnyRunConfig, ranks: Any) -> dict[str, Any]:
    from regen_dist.distributed.zero3 import build_engine
    from regen_dist.training.run import build_task

    engine = build_engine(config, ranks, build_task(config, ranks.device).build)
    return {name: master.detach().clone().numpy() for name, master in engine.named_masters()}


def _stopper_after(stopper: type[Any], steps: int | None) -> type[Any]:
    """A `Stopper` that also wants to stop after `steps` steps of this start, as if a signal had come."""

    class After(stopper):  # type: ignore[misc]
        asked = 0

        def wanted(self) -> bool:
            self.asked += 1
            if steps is not None and self.asked >= steps:
                self.reason = self.reason or f"the test, after {steps} steps"
            return super().wanted()  # type: ignore[no-any-return]

    return After


def forget_moments(run: Path) -> None:
    """Set the optimizer's moments in a run's checkpoints to zero, and make their manifests agree: a checkpoint that
    loads, but is wrong."""
    from safetensors.torch import load_file

    from regen_dist.checkpoint.folder import CheckpointFolder
    from regen_dist.checkpoint.shards import write_shard

    folder = CheckpointFolder(run / "checkpoints")
    for step in folder.steps():
        facts = {}
        for shard in run.glob(f"checkpoints/step-{step:08d}/*.safetensors"):
            mapped = load_file(shard)  # of a file that is about to be written anew
            tensors = {name: 0 * x if name.startswith("exp_avg") else x.clone() for name, x in mapped.items()}
            with shard.open("wb") as file:
                facts[shard.name] = write_shard(file, tensors)
        folder.update_manifest(folder.manifest(step), files=facts)


# `regen` in ranks that begin with everything imported: what `regen train --ranks 2` starts, without the seconds of its
# imports and without the launcher above them.


RANKS = 2


def start_regen_ranks(*arguments: object, logs: Path) -> Started:
    """Start the command line in two ranks; their results are exit codes. What each prints goes to `logs/rank_N.log`."""
    return start_ranks(_regen, RANKS, list(map(str, arguments)), logs=logs)


def run_regen_ranks(*arguments: object, logs: Path, timeout_s: float = 240.0) -> list[int]:
    """The same to its end; returns the exit code of each rank."""
    with start_regen_ranks(*arguments, logs=logs) as started:
        return started.results(timeout_s, codes=True)


def run_regen_alone(*arguments: object, logs: Path, timeout_s: float = 240.0) -> int:
    """The command line in one process that is no rank, as a user's shell starts it, to its end; returns its exit code.
    What it prints is in `logs/rank_0.log`."""
    with start_ranks(_regen_alone, 1, list(map(str, arguments)), logs=logs) as started:
        return int(started.results(timeout_s, codes=True)[0])


def said(logs: Path) -> list[str]:
    """What each rank has printed until now."""
    paths = [logs / f"rank_{rank}.log" for rank in range(RANKS)]
    return [path.read_text() if path.exists() else "" for path in paths]


def _regen(arguments: list[str]) -> int:
    from tools.cli import main

    sys.argv = ["regen", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _regen_alone(arguments: list[str]) -> int:
    left = without_ranks(os.environ)
    for name in [name for name in os.environ if name not in left]:
        del os.environ[name]
    return _regen(arguments)
