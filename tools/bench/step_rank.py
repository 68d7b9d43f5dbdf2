"""One rank of `regen bench step`: `python tools/bench/step_rank.py --help`.

Trains a run for a few steps, by the training step of the library (`training/step.py`), and leaves what they took in
`OUT/rank-N.json`. It uses nothing of the programs beside it: `regen bench step --against` starts that of the other
checkout with the library of the other checkout (`PYTHONPATH`), for a comparison of before and after.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from regen_dist.config import AnyRunConfig, load_config
from regen_dist.distributed.engine import build_engine
from regen_dist.distributed.failing import ending_at_once
from regen_dist.distributed.ranks import Ranks, process_group, read_environment
from regen_dist.jsontext import json_text
from regen_dist.training.meter import Meter
from regen_dist.training.registry import build_task
from regen_dist.training.step import Stepper

_KIB = 1024


def result_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its figures."""
    return folder / f"rank-{rank}.json"


def quiet() -> None:
    """The arithmetic of a training run (`training.run`), without its warnings."""
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class Training:
    """A run's task, engine and batches in this process.

    Args:
        config: of the run.
        ranks: this process's place.
        compiled: whether the model goes through `torch.compile`; of the plain engine alone.
        before_model: called when the data is open and a batch was read, before there is a model.
    """

    def __init__(
        self,
        config: AnyRunConfig,
        ranks: Ranks,
        *,
        compiled: bool = False,
        before_model: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._uncounted = config, list[Any]()
        self._task = build_task(config, ranks.device)
        batches = self._task.batches(_readers(config, ranks), 0)
        self._held = next(batches)
        self.sample = _shape(self._held)
        before_model()
        engine = build_engine(config, ranks, self._task.build)
        self.parameters = sum(math.prod(shape) for shape in engine.shapes().values())
        if compiled:
            engine.module.compile()
        meter = Meter(ranks, config.train.batch_global, peak_tflops=1.0)  # its MFU is not asked for
        self._stepper = Stepper(config, ranks, self._task, engine, meter, batches=batches)

    def step(self) -> None:
        """The loop's own step; the loss is waited for, as the loop does."""
        with record_function("step"):
            made = self._stepper.train_step()
        self.loss, _ = self._stepper.meter.end_step()
        self._uncounted.append(made.batch)

    def flops(self) -> float:
        """The model's operations in the steps since the last call. Counting a shape that is new takes a while: not to
        be called while a clock runs."""
        batches, self._uncounted = self._uncounted, []
        return self._config.train.accumulation * sum(self._task.flops(batch) for batch in batches)

    def close(self) -> None:
        """End the data workers."""
        self._stepper.close_batches()


def _readers(config: AnyRunConfig, ranks: Ranks) -> Ranks:
    """The place among those that have samples of their own: ranks that share rows of tokens read the same."""
    shared = config.engine.sequence_parallel
    return Ranks(ranks.rank // shared, ranks.world_size // shared, ranks.local_rank)


def _shape(batch: Any) -> dict[str, Any]:
    """What an account of the batch depends on: its number of samples, and their sizes."""
    if hasattr(batch, "video"):
        samples, _, frames, *size = batch.video.shape
        return {"samples": samples, "frames": frames, "size": size}
    samples, clips, _, *size = batch.content.shape
    return {"samples": samples, "frames": 2 * clips, "size": size, "text_tokens": batch.mask.shape[1]}


def memory_now_bytes(name: str) -> int:
    """A figure of /proc/self/status: `VmRSS` is resident now, `VmHWM` was at most since the process began, or since
    `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * _KIB for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Let `VmHWM` begin anew (Linux, proc(5): clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def tensor_peak(work: Callable[[], object]) -> int:
    """Bytes that tensors in host memory held at most while `work` ran, of those that it made: what
    `torch.cuda.max_memory_allocated` tells of a GPU. Slow; what the profiler keeps is not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = sorted((each for each in events if each["name"] == "[memory]"), key=lambda each: each["ts"])
    told = [each["args"] for each in changes]
    before = told[0]["Total Allocated"] - told[0]["Bytes"] if told else 0  # by what was profiled earlier
    return max((each["Total Allocated"] - before for each in told), default=0)


def measure_tensors(config: AnyRunConfig, ranks: Ranks, *, warm: int) -> dict[str, Any]:
    """The most that the tensors of a run held, from the building of the model through its first `warm` steps."""
    made: list[Training] = []

    def work() -> None:
        made.append(Training(config, ranks))
        for _ in range(warm):
            made[0].step()

    try:
        return {"tensor_bytes": tensor_peak(work), "sample": made[0].sample}
    finally:
        for training in made:
            training.close()


def measure(config: AnyRunConfig, ranks: Ranks, *, warm: int, steps: int) -> dict[str, Any]:
    """CPU and wall seconds of each of `steps` steady steps, and the resident memory at most above what the process had
    before there was a model."""
    base: list[int] = []

    def before_model() -> None:
        _import_backend(config)
        forget_peak()
        base.append(memory_now_bytes("VmRSS"))

    training = Training(config, ranks, before_model=before_model)
    try:
        for _ in range(warm):
            training.step()
        turns = [_timed(training) for _ in range(steps)]
    finally:
        training.close()
    memory = {"base_bytes": base[0], "peak_bytes": memory_now_bytes("VmHWM") - base[0]}
    told = {"parameters": training.parameters, "sample": training.sample, "loss": training.loss}
    return {"steps": turns, **memory, **told, "threads": torch.get_num_threads()}


def _timed(training: Training) -> dict[str, float]:
    begun, cpu_begun = time.perf_counter(), time.process_time()
    training.step()
    return {"cpu_s": time.process_time() - cpu_begun, "seconds": time.perf_counter() - begun}


def _import_backend(config: AnyRunConfig) -> None:
    """What the code of DeepSpeed, of optimizers and of products takes by itself is no part of the state."""
    if config.engine.kind == "zero3":
        import deepspeed  # noqa: F401
    weight = torch.nn.Parameter(torch.ones(64, 64))
    (weight @ weight).sum().backward()
    torch.optim.AdamW([weight]).step()


def main() -> None:
    """Measure as the rank that the environment describes."""
    parser = argparse.ArgumentParser(description="One rank of `regen bench step`.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--warm", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured")
    parser.add_argument("--tensors", action="store_true", help="measure the memory of tensors, and no time")
    given = parser.parse_args()
    quiet()
    ranks, config = read_environment(), load_config(given.config, given.overrides)
    with ending_at_once(), process_group(ranks, needed=config.engine.kind == "zero3"):
        found = (
            measure_tensors(config, ranks, warm=given.warm)
            if given.tensors
            else measure(config, ranks, warm=given.warm, steps=given.steps)
        )
    result_file(given.out, ranks.rank).write_text(json_text(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
