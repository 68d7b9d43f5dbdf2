"""`regen miniature`: the whole system on this machine, from synthetic captioned videos to scores of generated ones."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.errors import EXIT_RESUME, TrainingError
from tools import stages

if TYPE_CHECKING:
    from rich.table import Table

    from launcher.pipelines.schema import Pipeline

PIPELINE, HARD = Path("configs/pipelines/miniature.yaml"), Path("configs/pipelines/miniature_hard.yaml")
_BUCKET = "miniature"
_TRAINING, _SCORE = "t2v", "score"  # steps: the one that is interrupted once on purpose, and the last


def miniature(
    overrides: Annotated[list[str] | None, typer.Argument(help="Pipeline overrides, as a.b=value.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of all outputs and of the object store's data. [runs/miniature, or …_hard]"),
    ] = None,
    hard: Annotated[bool, typer.Option("--hard", help="Four backgrounds, and videos of two clips.")] = False,
) -> None:
    """Train an embedder and a text-to-video model on synthetic videos in a local object store; generate and score.

    The text-to-video training is interrupted half-way once and resumed. The same command continues where it stopped and
    skips finished steps. Fails (exit code 6) if the generated videos miss a target.

    Examples:

    regen miniature variables.t2v_steps=1000

    regen miniature --hard
    """
    from launcher.pipelines.schema import load_pipeline
    from tools.local_services.s3 import start_store

    began, pipeline = time.monotonic(), HARD if hard else PIPELINE
    out = out or Path("runs") / pipeline.stem
    changes = _changes(out, overrides or [])
    planned = load_pipeline(pipeline, changes)
    with start_store(out / "store", bucket=_BUCKET) as server:
        environment = {**os.environ, **server.environment()}
        _see_through(["submit", "pipeline", str(pipeline), "--cluster", "local", *changes], planned, environment)
    _conclude(planned, time.monotonic() - began)


def _changes(out: Path, overrides: Sequence[str]) -> list[str]:
    """Return the pipeline overrides: its folder, its data, and the precision of this machine."""
    precision = stages.working_precision()
    if precision != "bf16":
        print(f"This CPU has no native bf16 multiplication: the miniature trains in {precision}.", flush=True)
    own = [f"output={out.parent}", f"name={out.name}", f"variables.data=s3://{_BUCKET}/data"]
    return [*own, f"variables.precision={precision}", *overrides]


def _see_through(arguments: Sequence[str], planned: Pipeline, environment: Mapping[str, str]) -> None:
    """Run the pipeline to its end; the first time, stop the text-to-video training half-way by the file STOP and resume
    by the same command."""
    from regen_dist.config import load_config

    step = planned.steps[_TRAINING]
    training = load_config(step.train or "", step.overrides)
    half = training.train.steps // 2
    has_been = stages.was_resumed(training.folder) or stages.last_step(training.folder) >= half
    stages.announce(arguments)
    ended = stages.run_until(arguments, training.folder, None if has_been else half, environment)
    if ended.code == EXIT_RESUME and ended.on_purpose:
        print(
            f"The training of {_TRAINING} was stopped half-way on purpose (exit code {EXIT_RESUME}). The same command "
            "goes on:",
            flush=True,
        )
        stages.announce(arguments)
        ended = stages.run_until(arguments, training.folder, None, environment)
    if ended.code:
        raise typer.Exit(ended.code)


def _conclude(planned: Pipeline, seconds: float) -> None:
    """Print the table and the page's path, and fail if a target is missed."""
    from rich.console import Console

    report, page = (Path(each) for each in planned.steps[_SCORE].outputs)
    found = json.loads(report.read_text(encoding="utf-8"))
    console = Console()
    console.print()
    console.print(_table(found))
    console.print(f"{seconds / 60:.1f} minutes. The page: {page}", highlight=False, soft_wrap=True)
    if found["missed"]:
        raise TrainingError(f"the targets are missed: {'; '.join(found['missed'])}")


def _table(found: dict[str, Any]) -> Table:
    from rich.table import Table

    targets: dict[str, float] = found["targets"]
    table = Table(title="read right by a detector without learning")
    table.add_column("videos")
    for name in ("number", *targets):
        table.add_column(name, justify="right")
    for name, arm in found["arms"].items():
        scores = [arm["scores"][measure] for measure in targets]
        style = "bold" if name == found["targets_are_for"] else ""
        table.add_row(name, f"{scores[0]['number']}", *(f"{each['share']:.1%}" for each in scores), style=style)
    table.add_section()
    table.add_row("target", f"≥ {found['least_videos']}", *(f"≥ {target:.0%}" for target in targets.values()))
    return table
