"""Real ranks on this machine for tests: processes that find each other through the usual variables."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from launcher.local import rank_environment
from regen_dist.config.schema import RunConfig
from regen_dist.observe.record import read_record


class Job(NamedTuple):
    """One run for `train_jobs`: its config, and after how many steps of this start it is asked to stop.

    With 0 steps it is not trained: the result is this rank's master weights at the start, as numpy arrays.
    """

    config: RunConfig
    stop_after: int | None = None


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 150.0) -> list[Any]:
    """Call `function(*args)` in `world_size` new processes that form one job; returns each rank's result.

    Function, arguments and results must pickle; send tensors as numpy arrays. When a rank fails or time is up, every
    rank is killed by its process id, and the failure is raised here with the rank's traceback.
    """
    context = multiprocessing.get_context("spawn")
    common = rank_environment(os.environ, world_size)
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_rank, args=(sender, common, rank, function, args), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()  # the rank's own end is what must close when it dies
        return _collect([receiver for receiver, _ in pipes], timeout_s)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
            process.join()


def _collect(receivers: Sequence[Connection], timeout_s: float) -> list[Any]:
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
                raise RuntimeError(f"rank {rank} ended without a result") from None
            if not ended_well:
                raise RuntimeError(f"rank {rank} failed:\n{results[rank]}")
    return [results[rank] for rank in range(len(receivers))]


def _rank(
    sender: Connection, common: dict[str, str], rank: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        sender.send((True, function(*args)))
    except BaseException:  # noqa: BLE001 - told to the parent, which raises it
        sender.send((False, traceback.format_exc()))
    sender.close()


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
        time.sleep(0.02)


def train_jobs(jobs: Sequence[Job]) -> list[Any]:
    """What a rank does with `run_ranks`: one training run after the other; returns their exit codes.

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


def _starting_masters(config: RunConfig, ranks: Any) -> dict[str, Any]:
    from regen_dist.distributed.engine import build_engine
    from regen_dist.training.tasks import build_task

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
    from safetensors.torch import load_file, save_file

    for shard in run.glob("checkpoints/step-*/*.safetensors"):
        tensors = {name: 0 * x if name.startswith("exp_avg") else x for name, x in load_file(shard).items()}
        save_file(tensors, shard)
        manifest = shard.with_name("manifest.json")
        content = json.loads(manifest.read_text())
        content["files"][shard.name]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(content))
