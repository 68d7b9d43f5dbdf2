"""`regen bench ablation`: prediction target, timestep density and loss weighting against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regen_dist.jsontext import json_text


def ablation(
    config: Annotated[Path, typer.Argument(help="What every arm starts from.")] = Path("configs/bench/ablation.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as a.b=value.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs, the JSON and the table.")] = Path("runs/ablation"),
    at_once: Annotated[int, typer.Option(min=1, help="Arms that train side by side.")] = 2,
) -> None:
    """Train every combination of target, timestep density and loss weighting at one budget, and tabulate their PSNR.

    The same command again skips the arms that are done and resumes the one that was not.

    Example: regen bench ablation train.steps=400
    """
    from rich.console import Console

    from launcher.arms import run_side_by_side
    from regen_dist.config import config_hash, load_embedder_config
    from regen_dist.evaluation.ablation import arms, measure_arm, table
    from regen_dist.observe.hardware import describe_machine
    from regen_dist.programs import regen

    console, grid = Console(), list(arms())
    own = [*(overrides or []), f"output={out}/arms", "engine.kind=plain"]
    base = load_embedder_config(config, own)
    train = regen("train", str(config), *own)
    commands = {arm.name: [*train, f"name={arm.name}", *arm.overrides] for arm in grid}
    console.print(f"{len(grid)} arms of {base.train.steps} steps, {at_once} at a time")
    run_side_by_side(commands, logs=out / "logs", at_once=at_once, done=lambda name: console.print(f"done: {name}"))
    results = [measure_arm(arm, out / "arms" / arm.name) for arm in grid]
    facts: dict[str, Any] = {
        "command": "regen bench ablation",
        "steps": base.train.steps,
        "machine": describe_machine(),
    }
    facts |= {"config": str(config), "overrides": overrides or [], "config_hash": config_hash(base), "arms": results}
    (out / "ablation.json").write_text(json_text(facts, indent=1) + "\n", encoding="utf-8")
    (out / "ablation.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    console.print(f"written: {out / 'ablation.json'}, {out / 'ablation.md'}")
