"""`regen bench ablation`: comparison of prediction targets, timestep densities and loss weightings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch.nn.functional as F
import typer

from regen_dist.config import embedder_only, load_saved_config
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.loading.validation import validation_clip
from regen_dist.errors import ConfigError
from regen_dist.inference.codec import Codec
from regen_dist.observe.record import read_record
from regen_dist.pixels import to_float
from regen_dist.tables import Column, Table, numbers
from tools.bench.common import config_facts, only_one, opening_facts, run_side_by_side, split_arguments, write_record
from tools.shards.progress import stopping_cleanly

_CONFIG = Path("configs/bench/ablation.yaml")


def ablation(
    config: Annotated[Path, typer.Argument(help="What every arm starts from.", metavar="[CONFIG]")] = _CONFIG,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs, the JSON and the table.")] = Path("runs/ablation"),
    at_once: Annotated[int, typer.Option(min=1, help="Arms that train side by side.")] = 2,
) -> None:
    """Train every combination of target, timestep density and loss weighting at one budget, and tabulate their PSNR.

    The same command again skips the arms that are done and resumes the one that was not.

    Example: regen bench ablation train.steps=400
    """
    from regen_dist.config import load_embedder_config
    from regen_dist.programs import regen

    grid = list(arms())
    config, asked = split_arguments(config, overrides or [], _CONFIG)
    own = [*asked, f"output={out}/arms", "engine.kind=plain"]
    base = load_embedder_config(config, own)
    for url in filter(None, (base.data.url, base.data.validation_url)):
        open_dataset(url)  # a missing one is refused now, not by every arm
    train = regen("train", str(config), *own)
    commands = {arm.name: [*train, f"name={arm.name}", *arm.overrides] for arm in grid}
    facts = opening_facts() | config_facts(config, asked, base) | {"steps": base.train.steps}
    with stopping_cleanly(), only_one(out):
        print(f"{len(grid)} arms of {base.train.steps} steps, {at_once} at a time", flush=True)
        run_side_by_side(commands, logs=out / "logs", at_once=at_once, done=lambda name: print(f"done: {name}"))
        facts["arms"] = [measure_arm(arm, out / "arms" / arm.name) for arm in grid]
        write_record(out, "ablation", facts, table(facts["arms"]))


# Arms of the ablation: prediction target x timestep density x loss weighting, all at the same budget.
#
# An arm is an ordinary training run with other overrides; this module names the arms, reads what they reached and
# tabulates it.

HALF, NONE = 0.5, 0.0
STEPS = (1, 4)


class AblationArm(NamedTuple):
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
        """Overrides that distinguish this arm from its config."""
        return [
            f"diffusion.target={self.target}",
            f"diffusion.density.kind={self.density}",
            f"diffusion.density.pure_noise={self.pure_noise}",
            f"diffusion.weighting={self.weighting}",
            f"model.linear_start={'dct' if self.target == 'x0' else 'random'}",  # which decodes x0
        ]


def arms() -> Iterator[AblationArm]:
    """Yield every combination that can be trained: noise prediction uses no samples at pure noise, which carry no
    information on x0."""
    for target, density, pure_noise, weighting in product(
        ("x0", "velocity", "eps"), ("uniform", "logit_normal"), (NONE, HALF), ("x0", "velocity")
    ):
        if target != "eps" or pure_noise == NONE:
            yield AblationArm(target, density, pure_noise, weighting)


def measure_arm(arm: AblationArm, run: Path) -> dict[str, Any]:
    """Return the results of an arm: PSNR of the validation clips in 1 and 4 steps (None if impossible), and training
    figures."""
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
    """Format the results as a Markdown table, best one-step PSNR first."""
    columns: list[Column | str] = ["target", "density", *numbers("share at pure noise"), "loss weighted as"]
    columns += numbers(*(f"PSNR, {steps} step{'s' if steps > 1 else ''}" for steps in STEPS))
    rows = []
    for row in sorted(results, key=lambda row: -(row["psnr_1_step_db"] or 0.0)):
        figures = [
            "impossible" if row[f"psnr_{n}_step_db"] is None else f"{row[f'psnr_{n}_step_db']:.2f} dB" for n in STEPS
        ]
        rows.append([row["target"], row["density"], f"{row['pure_noise']:g}", row["weighting"], *figures])
    return Table(columns, rows).to_markdown()
