"""How many steps an arm gets for its time, which learning rate, and what its training took in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from regen_dist.checkpoint.export import find_checkpoint, open_run
from regen_dist.config import RunConfig, embedder_only, load_saved_config
from regen_dist.data.reading.validation import validation_clip
from regen_dist.errors import CheckpointError, ConfigError
from regen_dist.evaluation.compression.quality import Decoded, mean_psnr_db
from regen_dist.inference.codec import Codec
from regen_dist.models.accounting import account, training_flops_per_clip
from regen_dist.observe.record import read_record
from regen_dist.pixels import to_float, to_frames

LEAST_STEPS = 4
TUNED_ON = 16  # clips of the validation data


def pace(run: Path, warm: int) -> dict[str, float]:
    """Seconds a step of a short run that logged every step, the median of those after `warm`: `cpu_s` of its process,
    `wall_s` by the clock. On a core that nothing else uses they are equal."""
    lines = read_record(run / "metrics.jsonl", "train")[warm:]
    named = {"cpu_s": "cpu_step_s", "wall_s": "step_s"}
    return {name: median(line[key] for line in lines) for name, key in named.items()}


def num_steps(minutes: float, seconds_per_step: float) -> int:
    """Steps that fit into the time, at least `LEAST_STEPS`."""
    return max(LEAST_STEPS, int(60 * minutes / seconds_per_step))


def paced(overrides: Sequence[str], steps: int, warmup_steps: int) -> list[str]:
    """Overrides of a run of so many steps, whose warm-up is at most a tenth of it."""
    return [*overrides, f"train.steps={steps}", f"optimizer.warmup_steps={min(warmup_steps, max(1, steps // 10))}"]


def best_rate(tried: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The learning rate with the highest PSNR, and whether it lies at an edge of what was tried (then a better one may
    lie beyond).

    Args:
        tried: `lr` and `psnr_db` of each.
    """
    rates = sorted(each["lr"] for each in tried)
    best = max(tried, key=lambda each: each["psnr_db"])["lr"]
    return {
        "lr": best,
        "at_edge": len(rates) > 1 and best in (rates[0], rates[-1]),
        "tried": [dict(each) for each in tried],
    }


def validation_psnr_db(run: Path) -> float:
    """One-step PSNR in dB of a run on its validation data, the mean over clips: what learning rates are chosen by."""
    config, codec = embedder_only(load_saved_config(run), str(run)), Codec.load(run)
    batch = validation_clip(config.data, num_frames=codec.num_frames, most=TUNED_ON)
    source = to_float(batch.video)
    made = codec.decode(codec.encode(source), torch.arange(codec.num_frames), sample_ids=batch.sample_ids.tolist())
    return mean_psnr_db(Decoded(to_frames(a), to_frames(b)) for a, b in zip(source, made, strict=True))


def is_trained(run: Path, steps: int) -> bool:
    """Whether a run has the checkpoint of its last step."""
    try:
        _, folder = open_run(run)
        return find_checkpoint(folder, checksums=False).step >= steps
    except (ConfigError, CheckpointError):  # not begun, or not saved yet
        return False


def training_facts(run: Path) -> dict[str, Any]:
    """What the training of an arm took, and what its model is.

    `seconds` are of its steps by the clock and `cpu_seconds` those of its process, without validation and saving;
    `flops` those of forward and backward passes.
    """
    config = embedder_only(load_saved_config(run), str(run))
    lines = read_record(run / "metrics.jsonl", "train")
    steps = lines[-1]["step"]
    clips = steps * config.train.batch_global
    return {
        "lr": config.optimizer.lr,
        "steps": steps,
        "clips": clips,
        "seconds": _total(lines, "step_s"),
        "cpu_seconds": _total(lines, "cpu_step_s"),
        "flops": clips * _flops_per_clip(config),
        "loss": lines[-1]["loss"],
        "skipped": lines[-1]["skipped"],
        **_model_facts(config),
    }


def _total(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    """Over all steps; a line holds the mean since the one before it."""
    begun = [0, *(line["step"] for line in lines)]
    return float(sum(line[name] * (line["step"] - before) for line, before in zip(lines, begun, strict=False)))


def _flops_per_clip(config: RunConfig) -> int:
    frames = config.model.num_frames
    decoded = min(config.diffusion.train_frames or frames, frames) if config.model.kind == "regen" else frames
    return training_flops_per_clip(config.model, config.data.size, frames, decoded)


def _model_facts(config: RunConfig) -> dict[str, Any]:
    """Parameters of each part, operations to encode a clip and to decode it in one step."""
    counted = account(config.model, config.data.size)
    encode = counted.forward_flops["encoder"]
    return {
        "parameters": counted.parameters,
        "encode_flops": encode,
        "decode_flops": counted.num_forward_flops - encode,
        "bits_per_pixel": counted.bits_per_pixel,
    }
