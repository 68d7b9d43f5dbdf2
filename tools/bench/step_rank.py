"""One rank of `regen bench step`: `python tools/bench/step_rank.py --help`.

Trains a run for a few steps, by the training step of the library (`training/loop.py`), and leaves what they took in
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from regen_dist.config import AnyRunConfig, EmbedderConfig, load_config
from regen_dist.distributed.ranks import Ranks, make_repeatable, process_group, read_environment
from regen_dist.distributed.rendezvous import ending_at_once
from regen_dist.distributed.zero3 import build_engine
from regen_dist.jsontext import json_text
from regen_dist.models.flops import FlopReport, count_flops, count_row_flops
from regen_dist.models.memory import memory_bytes
from regen_dist.observe.hardware import forget_peak, peak_tflops, process_memory_bytes
from regen_dist.training.loop import Stepper
from regen_dist.training.metrics import StepMeter
from regen_dist.training.run import build_task
from tools.bench.common import Case, Rounds, Turn, ratio, spread


def result_file(folder: Path, rank: int) -> Path:
    """Return the path of a rank's figures."""
    return folder / f"rank-{rank}.json"


def quiet(device: torch.device, *, deterministic: bool = False) -> None:
    """Set up the arithmetic of a training run (`training.run`) without its warnings."""
    make_repeatable(device, deterministic=deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class Training:
    """Task, engine and batches of a run in this process.

    Args:
        config: config of the run.
        ranks: rank information of this process.
        compiled: use `torch.compile`; plain engine only.
        before_model: called after the first batch was read, before the model is built.
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
        self._first_batch = next(batches)
        self.sample = _shape(self._first_batch)
        before_model()
        engine = build_engine(config, ranks, self._task.build)
        self.parameters = sum(math.prod(shape) for shape in engine.shapes().values())
        if compiled:
            engine.module.compile()
        meter = StepMeter(ranks, config.train.batch_global, peak_tflops=1.0)  # its MFU is not asked for
        self._stepper = Stepper(config, ranks, self._task, engine, meter, batches=batches)

    def step(self) -> None:
        """Run the training loop's step and wait for the loss, as the loop does."""
        with record_function("step"):
            made = self._stepper.train_step()
        self.loss, _ = self._stepper.meter.end_step()
        self._uncounted.append(made.batch)

    def flops(self) -> float:
        """Return the model FLOPs of the steps since the last call. Counting a new shape takes time: do not call it
        while timing."""
        batches, self._uncounted = self._uncounted, []
        return self._config.train.accumulation * sum(self._task.flops(batch) for batch in batches)

    def close(self) -> None:
        """Stop the data workers."""
        self._stepper.close_batches()


def _readers(config: AnyRunConfig, ranks: Ranks) -> Ranks:
    """Return the rank among those with their own samples: ranks that share rows of tokens read the same ones."""
    shared = config.engine.sequence_parallel
    return Ranks(ranks.rank // shared, ranks.world_size // shared, ranks.local_rank)


def _shape(batch: Any) -> dict[str, Any]:
    """Return what the FLOP count of a batch depends on: number and sizes of its samples."""
    if hasattr(batch, "video"):
        samples, _, frames, *size = batch.video.shape
        return {"samples": samples, "frames": frames, "size": size}
    samples, clips, _, *size = batch.content.shape
    return {"samples": samples, "frames": 2 * clips, "size": size, "text_tokens": batch.mask.shape[1]}


def tensor_peak(work: Callable[[], object]) -> int:
    """Return the peak bytes of host tensors allocated by `work`: the counterpart of `torch.cuda.max_memory_allocated`.
    Slow; the profiler's own memory is not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = sorted((each for each in events if each["name"] == "[memory]"), key=lambda each: each["ts"])
    facts = [each["args"] for each in changes]
    before = facts[0]["Total Allocated"] - facts[0]["Bytes"] if facts else 0  # by what was profiled earlier
    return max((each["Total Allocated"] - before for each in facts), default=0)


def measure_tensors(config: AnyRunConfig, ranks: Ranks, *, warm: int) -> dict[str, Any]:
    """Return the peak of a run's tensors, from building the model through its first `warm` steps."""
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
    """Return CPU and wall seconds of each of `steps` steady steps, and the peak resident memory above that before the
    model was built."""
    base: list[int] = []

    def before_model() -> None:
        _import_backend(config)
        forget_peak()
        base.append(process_memory_bytes("VmRSS"))

    training = Training(config, ranks, before_model=before_model)
    try:
        for _ in range(warm):
            training.step()
        turns = [_timed(training) for _ in range(steps)]
    finally:
        training.close()
    memory = {"base_bytes": base[0], "peak_bytes": process_memory_bytes("VmHWM") - base[0]}
    facts = {"parameters": training.parameters, "sample": training.sample, "loss": training.loss}
    return {"steps": turns, **memory, **facts, "threads": torch.get_num_threads()}


def _timed(training: Training) -> dict[str, float]:
    begun, cpu_begun = time.perf_counter(), time.process_time()
    training.step()
    return {"cpu_s": time.process_time() - cpu_begun, "seconds": time.perf_counter() - begun}


def _import_backend(config: AnyRunConfig) -> None:
    """Import DeepSpeed, optimizers and kernels first: their code is not part of the state's memory."""
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
    ranks, config = read_environment(), load_config(given.config, given.overrides)
    quiet(ranks.device, deterministic=config.engine.deterministic)
    with ending_at_once(), process_group(ranks, needed=config.engine.kind == "zero3"):
        found = (
            measure_tensors(config, ranks, warm=given.warm)
            if given.tensors
            else measure(config, ranks, warm=given.warm, steps=given.steps)
        )
    result_file(given.out, ranks.rank).write_text(json_text(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()


# Profile of a training step: torch's profiler over a few steps, with operators combined into groups.
#
# A group gets the self time of its operators. Operators inside a marked range (`record_function`) count for the
# range.

PRODUCTS, ATTENTION, CONVOLUTIONS = "matrix products", "attention", "convolutions"
NORMS, ACTIVATIONS, ELEMENTWISE = "norms and modulation", "activations", "elementwise, casts and copies"
NOISE, UPDATE, BATCHES, REST = "noise", "optimizer, clipping, EMA", "batch assembly", "Python and the rest"
GROUPS = (PRODUCTS, ATTENTION, CONVOLUTIONS, NORMS, ACTIVATIONS, ELEMENTWISE, NOISE, UPDATE, BATCHES, REST)
STRETCHES = {"noise": NOISE, "update": UPDATE, "batches": BATCHES}  # by the name that is recorded
_PARTS = {  # of an operator's name, in this order
    ATTENTION: ("bmm", "softmax", "scaled_dot_product", "attention"),
    CONVOLUTIONS: ("conv",),
    PRODUCTS: ("mm", "mkl_linear", "mkldnn_linear"),
    NORMS: ("layer_norm", "rms_norm", "rsqrt", "addcmul"),
    ACTIVATIONS: ("gelu", "silu", "sin", "cos", "tanh"),
}
_TOP = 12  # operators that are named one by one


class Event(Protocol):
    """Fields used of the profiler's events."""

    name: str
    self_cpu_time_total: float  # microseconds
    cpu_parent: Any


def group_of(event: Event) -> str:
    """Return the group of one event: that of its enclosing range, otherwise by its operator."""
    place: Any = event
    while place is not None:
        if place.name in STRETCHES:
            return STRETCHES[place.name]
        place = place.cpu_parent
    if not event.name.startswith(("aten::", "mkldnn", "Inductor", "cpp_fused")):
        return REST
    name = event.name.removeprefix("aten::")
    return next((group for group, parts in _PARTS.items() if any(part in name for part in parts)), ELEMENTWISE)


def shares(events: Iterable[Event]) -> dict[str, float]:
    """Return the share of the total time of each group."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        seconds[group_of(event)] += event.self_cpu_time_total
    whole = sum(seconds.values())
    return {group: each / whole for group, each in seconds.items()}


def profiled(step: Callable[[], object], steps: int) -> dict[str, Any]:
    """Return the shares of `steps` steps by group, and the most expensive operators."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    events: list[Any] = list(recorded.events() or ())
    return {"steps": steps, "groups": shares(events), "operators": _operators(events)}


def _operators(events: Iterable[Event]) -> dict[str, float]:
    """Return the shares of the most expensive operators, with their groups."""
    seconds: dict[str, float] = {}
    for event in events:
        name = f"{event.name} ({group_of(event)})"
        seconds[name] = seconds.get(name, 0.0) + event.self_cpu_time_total
    whole = sum(seconds.values())
    top = sorted(seconds, key=lambda name: -seconds[name])[:_TOP]
    return {name: seconds[name] / whole for name in top}


# Results of rank processes (`tools/bench/step_rank.py`): cost of sharding, and memory against its estimate.

CPU_TARGET, MEMORY_TARGET = 1.3, 0.1
Found = Mapping[str, Any]  # of one rank
Job = Sequence[Found]  # of all ranks of a start


def cpu_s(job: Job) -> float:
    """Return the CPU seconds of a step over all ranks: median of the steps."""
    return float(median(sum(rank["steps"][step]["cpu_s"] for rank in job) for step in range(len(job[0]["steps"]))))


def wall_s(job: Job) -> float:
    """Return the seconds of a step on the slowest rank."""
    return float(median(max(rank["steps"][step]["seconds"] for rank in job) for step in range(len(job[0]["steps"]))))


def compared(jobs: Mapping[str, Sequence[Job]], against: str) -> dict[str, Any]:
    """Compare jobs started in turn, each kind with another of the same round.

    Args:
        jobs: jobs by kind, one per round.
        against: reference kind.
    """
    base = [cpu_s(job) for job in jobs[against]]
    return {
        "against": against,
        "parameters": jobs[against][0][0]["parameters"],
        "cases": {
            kind: {
                "cpu_s": spread([cpu_s(job) for job in each]),
                "step_s": spread([wall_s(job) for job in each]),
                "peak_bytes": max(rank["peak_bytes"] for job in each for rank in job),
            }
            for kind, each in jobs.items()
        },
        "cpu_ratios": {
            kind: spread([cpu_s(job) / one for job, one in zip(each, base, strict=True)])
            for kind, each in jobs.items()
            if kind != against
        },
    }


def memory(job: Job, tensors: Job, config: AnyRunConfig) -> dict[str, Any]:
    """Return the memory of the fullest rank, with the estimate of `regen describe`.

    Args:
        job: resident memory of each rank: written pages of buffers, freed tensors still in the heap, and the libraries'
            own memory.
        tensors: peak tensor bytes of each rank, to which the estimate refers.
        config: config of the run.
    """
    terms = estimate(tensors[0]["sample"], config, world_size=len(tensors))
    written = estimate(job[0]["sample"], config, world_size=len(job), resident=True)
    measured, estimated = max(rank["tensor_bytes"] for rank in tensors), sum(terms.values())
    resident = max(rank["peak_bytes"] for rank in job)
    facts = {"tensor_bytes": measured, "estimated_bytes": estimated, "ratio": measured / estimated}
    return {**facts, "resident_bytes": resident, "resident_ratio": resident / sum(written.values()), "terms": terms}


def estimate(
    sample: Mapping[str, Any], config: AnyRunConfig, *, world_size: int, resident: bool = False
) -> dict[str, int]:
    """Return the terms of the estimate for batches like `sample`: of tensors, or of their resident part in host
    memory."""
    return memory_bytes(
        _account(sample, config),
        config.engine,
        world_size=world_size,
        clips_per_gpu=sample["samples"],
        accumulation=config.train.accumulation,
        on_gpu=not resident,
    )


def _account(sample: Mapping[str, Any], config: AnyRunConfig) -> FlopReport:
    height, width = sample["size"]
    kept: Any = {
        "precision": config.engine.precision,
        "activation_checkpointing": config.engine.activation_checkpointing,
        "sequence_parallel": config.engine.sequence_parallel,
    }
    if isinstance(config, EmbedderConfig):
        kept["decoded"] = config.diffusion.train_frames
        return count_flops(config.model, (height, width), num_frames=sample["frames"], **kept)
    kept["given_frames"] = config.diffusion.gives_frames
    return count_row_flops(config.model, sample["frames"], (height, width), sample["text_tokens"], **kept)


# Utilisation: model FLOP/s of a training step over those of plain matrix products on the same cores.
#
# The peak is measured before and after each series of steps, because it varies on shared machines.

MFU_TARGET = 0.6
PEAK_S = 0.4  # of matrix products, on either side of the steps

TakeStep = Callable[[], object]  # one optimizer step
Flops = Callable[[], float]  # the model's operations in the steps since it was last called
Peak = Callable[[], float]  # operations per second of bare matrix products


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float = PEAK_S) -> Peak:
    """Return the peak of this process's threads, measured at each call (on a known GPU: from its data sheet)."""
    return lambda: peak_tflops(device, dtype, seconds) * 1e12


def steps_case(step: TakeStep, flops: Flops, peak: Peak, steps: int) -> Case:
    """Return a case that runs this many steps per turn: `amount` is model FLOPs; `peak` the best rate of matrix
    products before and after, `cpu_s` the CPU seconds of this process."""

    def turn() -> Turn:
        flops()  # of what came before
        before = peak()
        begun, cpu_begun = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_begun
        return Turn(flops(), seconds, {"peak": max(before, peak()), "cpu_s": cpu_s, "steps": steps})

    return turn


def section(rounds: Rounds, *, threads: int, against: Mapping[str, str]) -> dict[str, Any]:
    """Combine the figures of all turns.

    Args:
        rounds: rounds of `steps_case`.
        threads: number of threads of steps and products.
        against: pairs of cases whose relative durations are reported, round by round.
    """
    return {
        "threads": threads,
        "target": MFU_TARGET,
        "cases": {name: _case(turns, threads) for name, turns in rounds.items()},
        "time_ratios": {name: ratio(_inverse(rounds[name]), _inverse(rounds[base])) for name, base in against.items()},
    }


def _case(turns: list[Turn], threads: int) -> dict[str, Any]:
    return {
        "flops_per_step": turns[0].amount / turns[0].facts["steps"],
        "step_s": spread([turn.seconds / turn.facts["steps"] for turn in turns]),
        "peak_tflops": spread([turn.facts["peak"] / 1e12 for turn in turns]),
        "mfu": spread([turn.rate / turn.facts["peak"] for turn in turns]),
        "mfu_by_cpu": spread([turn.amount / turn.facts["cpu_s"] / (turn.facts["peak"] / threads) for turn in turns]),
    }


def _inverse(turns: list[Turn]) -> list[Turn]:
    """Return turns whose rate is CPU seconds per step."""
    return [Turn(turn.facts["cpu_s"], turn.facts["steps"]) for turn in turns]
