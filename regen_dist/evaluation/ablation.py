"""The diffusion ablation: prediction target x timestep density x loss weighting, every arm at the same budget.

An arm is an ordinary training run with other overrides; this module names the arms, reads what they reached and
tabulates it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F

from regen_dist.config import embedder_only, load_saved_config
from regen_dist.data.reading.validation import validation_clip
from regen_dist.errors import ConfigError
from regen_dist.inference.codec import Codec
from regen_dist.observe.record import read_record
from regen_dist.pixels import to_float

HALF, NONE = 0.5, 0.0
STEPS = (1, 4)


class Arm(NamedTuple):
    """One combination. `pure_noise` is the share of training samples that start from pure noise."""

    target: str
    density: str
    pure_noise: float
    weighting: str

    @property
    def name(self) -> str:
        """Name of the arm's run."""
        return f"{self.target}-{self.density}-{self.pure_noise:g}-{self.weighting}"

    @property
    def overrides(self) -> list[str]:
        """What sets this arm apart from its config."""
        return [
            f"diffusion.target={self.target}",
            f"diffusion.density.kind={self.density}",
            f"diffusion.density.pure_noise={self.pure_noise}",
            f"diffusion.weighting={self.weighting}",
            f"model.linear_start={'dct' if self.target == 'x0' else 'random'}",  # which decodes x0
        ]


def arms() -> Iterator[Arm]:
    """Every combination that can be trained: a noise prediction takes no samples at pure noise, where it says nothing
    of x0."""
    for target, density, pure_noise, weighting in product(
        ("x0", "velocity", "eps"), ("uniform", "logit_normal"), (NONE, HALF), ("x0", "velocity")
    ):
        if target != "eps" or pure_noise == NONE:
            yield Arm(target, density, pure_noise, weighting)


def measure_arm(arm: Arm, run: Path) -> dict[str, Any]:
    """What an arm reached: PSNR of the validation clips in 1 and 4 steps (None where that is impossible), and its
    training."""
    config, codec = embedder_only(load_saved_config(run), str(run)), Codec.load(run)
    batch = validation_clip(config.data, num_frames=codec.num_frames)
    training = read_record(run / "metrics.jsonl", "train")
    facts = {
        **arm._asdict(),
        "run": arm.name,
        "steps_trained": training[-1]["step"],
        "skipped": training[-1]["skipped"],
    }
    return facts | {
        f"psnr_{steps}_step_db": _psnr_db(codec, batch.video, batch.sample_ids.tolist(), steps) for steps in STEPS
    }


def _psnr_db(codec: Codec, video: Any, ids: Sequence[int], steps: int) -> float | None:
    source = to_float(video)
    times = codec.model.frame_times(source)[0]
    try:
        decoded = codec.decode(codec.encode(source), times, steps=steps, sample_ids=ids)
    except ConfigError:  # a noise prediction has no first step from pure noise
        return None
    return float(10 * (4.0 / F.mse_loss(decoded.cpu(), source)).log10())


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table, best one-step PSNR first."""
    lines = [
        "| target | density | share at pure noise | loss weighted as | PSNR, 1 step | PSNR, 4 steps |",
        "| --- | --- | ---: | --- | ---: | ---: |",
    ]
    for row in sorted(results, key=lambda row: -(row["psnr_1_step_db"] or 0.0)):
        figures = [
            "impossible" if row[f"psnr_{n}_step_db"] is None else f"{row[f'psnr_{n}_step_db']:.2f} dB" for n in STEPS
        ]
        cells = [row["target"], row["density"], f"{row['pure_noise']:g}", row["weighting"], *figures]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
