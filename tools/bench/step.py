"""`regen bench step`: what a training step costs beside what the machine could do."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.jsontext import json_text
from tools.shards.stopping import stopping_cleanly

if TYPE_CHECKING:
    from tools.bench.step_parts import Bench


class Part(StrEnum):
    """What can be measured."""

    UTILISATION = "utilisation"
    MEMORY = "memory"
    SHARDING = "sharding"


def step(
    embedder: Annotated[Path, typer.Option(help="Config of the embedder.")] = Path("configs/bench/step_embedder.yaml"),
    t2v: Annotated[Path, typer.Option(help="Config of the text-to-video model.")] = Path("configs/bench/step_t2v.yaml"),
    sharded: Annotated[Path, typer.Option(help="Config of text to video that two ranks share.")] = Path(
        "configs/bench/step_sharded.yaml"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the table.")] = Path("runs/bench/step"),
    side: Annotated[int, typer.Option(help="Of text to video's videos, in pixels: a multiple of 16.", min=32)] = 128,
    steps: Annotated[int, typer.Option(help="Steps of one turn.", min=1)] = 3,
    repeats: Annotated[int, typer.Option(help="Turns of each.", min=1)] = 5,
    only: Annotated[list[Part] | None, typer.Option(help="Measure this alone; may be given again.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="The steps through torch.compile, too.")] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="Another checkout of this repository: measure its steps beside these, and nothing else."),
    ] = None,
) -> None:
    """Measure a training step: the model's operations per second beside bare matrix products, a profile, the price of
    recomputing activations and of ZeRO-3, memory beside its estimate. Takes fifteen minutes on two cores.

    Example: regen bench step --only utilisation --compile
    """
    from rich.console import Console

    from regen_dist.evaluation.step_speed.report import table
    from regen_dist.observe.hardware import describe_machine
    from tools import stages
    from tools.bench.step_parts import EMBEDDER, SHARDED, T2V, Bench, prepared
    from tools.bench.step_rank import quiet

    console, parts = Console(stderr=True), only or ([] if against else list(Part))
    facts: dict[str, Any] = {"command": " ".join(["regen", *sys.argv[1:]]), "machine": describe_machine()}
    facts |= {"load_before": os.getloadavg(), "precision": stages.working_precision()}
    facts |= {"steps": steps, "repeats": repeats, "runs": {}}
    out.mkdir(parents=True, exist_ok=True)
    quiet()
    with stopping_cleanly(), TemporaryDirectory(dir=out, prefix=".work-") as folder:
        runs = prepared({EMBEDDER: embedder, T2V: t2v, SHARDED: sharded}, Path(folder), side)
        bench = Bench(runs, Path(folder), steps, repeats, console.print)
        facts["runs"] = {name: run.facts() for name, run in runs.items()}
        for part in parts:
            console.print(f"measuring {part}")
            facts[part.value] = _measure(bench, part, compiled=compiled)
        if against is not None:
            console.print(f"measuring beside {against}")
            facts["against"] = bench.against(against)
    facts["load_after"] = os.getloadavg()
    (out / "step.json").write_text(json_text(facts, indent=1) + "\n", encoding="utf-8")
    (out / "step.md").write_text(table(facts), encoding="utf-8")
    print(table(facts))
    console.print(f"written: {out / 'step.json'}, {out / 'step.md'}")


def _measure(bench: Bench, part: Part, *, compiled: bool) -> dict[str, Any]:
    if part is Part.UTILISATION:
        return bench.utilisation(compiled=compiled)
    return bench.memory() if part is Part.MEMORY else bench.sharding()
