"""`regen bench checkpoint`: what saving and loading checkpoints costs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from regen_dist.jsontext import json_text
from tools.shards.stopping import stopping_cleanly

_CLIPS = 32


def checkpoint(
    config: Annotated[Path, typer.Argument(help="What is trained.")] = Path("configs/bench/checkpoint.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as a.b=value.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Folder in a bucket to save to, too; a SeaweedFS on this machine by default.")
    ] = None,
    bucket: Annotated[bool, typer.Option("--bucket/--no-bucket", help="Whether to measure a bucket.")] = True,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the table; its disk is measured.")] = Path(
        "runs/bench/checkpoint"
    ),
    ranks: Annotated[int, typer.Option(help="Processes that train, save and load.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="How often all of it is done, by new processes.", min=1)] = 2,
    repeats: Annotated[int, typer.Option(help="Turns of saving and loading in each round.", min=1)] = 2,
) -> None:
    """Measure checkpoints: what a save blocks and costs a real run, its bytes, saving and loading beside plain files,
    torch.distributed.checkpoint and DeepSpeed. Takes four minutes on two cores; leaves its figures alone.

    Example: regen bench checkpoint --no-bucket
    """
    from rich.console import Console

    from regen_dist.config import config_hash, load_embedder_config
    from regen_dist.config.worldsize import clips_per_rank
    from regen_dist.data.making.moving_shapes import SyntheticOptions
    from regen_dist.data.making.synthetic import build_synthetic
    from regen_dist.evaluation.checkpoint_speed.report import table
    from regen_dist.observe.hardware import describe_machine
    from tools.bench.checkpoint_rounds import Bench, sections

    console = Console(stderr=True)
    own = [*(overrides or []), "train.log_every=1", "data.validation_url=null", "checkpoint.url=null"]
    base = load_embedder_config(config, own)
    clips_per_rank(base, ranks)
    facts: dict[str, Any] = {"command": " ".join(["regen", *sys.argv[1:]]), "machine": describe_machine()}
    facts |= {"load_before": os.getloadavg(), "config": str(config), "overrides": own, "config_hash": config_hash(base)}
    facts |= {"ranks": ranks, "rounds": rounds, "repeats": repeats, "reads": "warm page cache"}
    out.mkdir(parents=True, exist_ok=True)
    with stopping_cleanly(), TemporaryDirectory(dir=out, prefix=".work-") as work:
        bench = Bench(config, tuple(own), ranks, repeats, Path(work), console.print)
        build_synthetic(
            bench.clips, SyntheticOptions(number=_CLIPS, seed=0, frames=2 * base.model.num_frames, samples_per_shard=16)
        )
        found = []
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds}")
            found.append(bench.round(number, url, bucket=bucket))
    facts |= sections(found) | {"load_after": os.getloadavg()}
    (out / "checkpoint.json").write_text(json_text(facts, indent=1) + "\n", encoding="utf-8")
    (out / "checkpoint.md").write_text(table(facts), encoding="utf-8")
    print(table(facts))
    console.print(f"written: {out / 'checkpoint.json'}, {out / 'checkpoint.md'}")
