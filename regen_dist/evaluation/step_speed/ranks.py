"""What rank processes found (`tools/bench/step_rank.py`): the price of sharding, and memory beside its estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from regen_dist.config import AnyRunConfig, RunConfig
from regen_dist.evaluation.data_speed.turns import spread
from regen_dist.models.accounting import Account, account, account_row
from regen_dist.models.memory import memory_bytes

CPU_TARGET, MEMORY_TARGET = 1.3, 0.1
Found = Mapping[str, Any]  # of one rank
Job = Sequence[Found]  # of all ranks of a start


def cpu_s(job: Job) -> float:
    """CPU seconds of a step over all ranks: the median of the steps."""
    return float(median(sum(rank["steps"][step]["cpu_s"] for rank in job) for step in range(len(job[0]["steps"]))))


def wall_s(job: Job) -> float:
    """Seconds of a step, of the slowest rank."""
    return float(median(max(rank["steps"][step]["seconds"] for rank in job) for step in range(len(job[0]["steps"]))))


def compared(jobs: Mapping[str, Sequence[Job]], against: str) -> dict[str, Any]:
    """Jobs that were started in turn, each kind beside another's of the same round.

    Args:
        jobs: by kind, one a round.
        against: the kind that the others are divided by.
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
    """The memory that the fullest rank took, beside the estimate of `regen describe`.

    Args:
        job: what each rank had resident: of a buffer what was written to, with what the heap keeps of tensors that are
            gone, and what libraries take for themselves.
        tensors: what the tensors of each rank held at once, which the estimate is of.
        config: of the run.
    """
    terms = estimate(tensors[0]["sample"], config, world_size=len(tensors))
    written = estimate(job[0]["sample"], config, world_size=len(job), resident=True)
    measured, estimated = max(rank["tensor_bytes"] for rank in tensors), sum(terms.values())
    resident = max(rank["peak_bytes"] for rank in job)
    told = {"tensor_bytes": measured, "estimated_bytes": estimated, "ratio": measured / estimated}
    return {**told, "resident_bytes": resident, "resident_ratio": resident / sum(written.values()), "terms": terms}


def estimate(
    sample: Mapping[str, Any], config: AnyRunConfig, *, world_size: int, resident: bool = False
) -> dict[str, int]:
    """The terms of the estimate for batches like `sample`; of tensors, or of what of them is resident in host
    memory."""
    return memory_bytes(
        _account(sample, config),
        config.engine,
        world_size=world_size,
        clips_per_gpu=sample["samples"],
        accumulation=config.train.accumulation,
        on_gpu=not resident,
    )


def _account(sample: Mapping[str, Any], config: AnyRunConfig) -> Account:
    height, width = sample["size"]
    kept: Any = {
        "precision": config.engine.precision,
        "activation_checkpointing": config.engine.activation_checkpointing,
        "sequence_parallel": config.engine.sequence_parallel,
    }
    if isinstance(config, RunConfig):
        return account(config.model, (height, width), num_frames=sample["frames"], **kept)
    return account_row(config.model, sample["frames"], (height, width), sample["text_tokens"], **kept)
