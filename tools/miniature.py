"""`regen miniature`: the whole system on this machine, from synthetic captioned videos to scores of generated ones; and
`regen score-shapes`: those scores, by a detector without learning."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.errors import ConfigError, TrainingError
from regen_dist.tables import Table, numbers
from tools import stages
from tools.shards.progress import progress_bar

if TYPE_CHECKING:
    from launcher.pipelines.schema import Pipeline
    from regen_dist.evaluation.miniature import Judgement

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
    changes = _pipeline_overrides(out, overrides or [])
    planned = load_pipeline(pipeline, changes)
    with start_store(out / "store", bucket=_BUCKET) as server:
        environment = {**os.environ, **server.environment()}
        _run_pipeline(["submit", "pipeline", str(pipeline), "--cluster", "local", *changes], planned, environment)
    _print_summary(planned, time.monotonic() - began)


def _pipeline_overrides(out: Path, overrides: Sequence[str]) -> list[str]:
    """Return the pipeline overrides: its folder, its data, and the precision of this machine."""
    precision = stages.working_precision()
    if precision != "bf16":
        print(f"This CPU has no native bf16 multiplication: the miniature trains in {precision}.", flush=True)
    own = [f"output={out.parent}", f"name={out.name}", f"variables.data=s3://{_BUCKET}/data"]
    return [*own, f"variables.precision={precision}", *overrides]


def _run_pipeline(arguments: Sequence[str], planned: Pipeline, environment: Mapping[str, str]) -> None:
    """Run the pipeline to its end; the first time, stop the text-to-video training half-way by the file STOP and resume
    by the same command."""
    from regen_dist.config import load_config

    step = planned.steps[_TRAINING]
    training = load_config(step.train or "", step.overrides)
    half = training.train.steps // 2
    has_been = stages.was_resumed(training.folder) or stages.last_step(training.folder) >= half
    stages.run_stopping_once(arguments, training.folder, None if has_been else half, environment)


def _print_summary(planned: Pipeline, seconds: float) -> None:
    """Print the table and the page's path, and fail if a target is missed."""
    from rich.console import Console

    report, page = (Path(each) for each in planned.steps[_SCORE].outputs)
    found = json.loads(report.read_text(encoding="utf-8"))
    console = Console()
    console.print()
    scores_table(found).show(console)
    console.print(f"{seconds / 60:.1f} minutes. The page: {page}", highlight=False, markup=False, soft_wrap=True)
    if found["missed"]:
        raise TrainingError(f"the targets are missed: {'; '.join(found['missed'])}")


# `regen score-shapes`.


def score_shapes(
    out: Annotated[Path, typer.Option(help="Folder for scores.json and index.html.")],
    held_out: Annotated[
        str | None, typer.Option(help="Folder or URL of the held-out dataset: the real videos.", metavar="URL")
    ] = None,
    embedder: Annotated[
        Path | None, typer.Option(help="Run or exported model: reconstructs the real videos, in one step.")
    ] = None,
    generated: Annotated[
        list[str] | None,
        typer.Option(
            help="Videos of `regen generate`; repeatable. The targets apply to the first.", metavar="NAME=FOLDER"
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(help="Run whose curves are shown; repeatable.", metavar="NAME=FOLDER"),
    ] = None,
    solvers: Annotated[Path | None, typer.Option(help="solvers.json of `regen bench solvers`, for the page.")] = None,
    number: Annotated[int, typer.Option(help="Maximum number of videos of each kind.", min=1)] = 200,
    previews: Annotated[int, typer.Option(help="Captions whose videos are on the page.", min=0, max=100)] = 12,
    require: Annotated[bool, typer.Option("--require", help="Fail (exit code 6) when a target is missed.")] = False,
) -> None:
    """Detect shapes in generated, reconstructed and real videos, compare them with the captions, and write a page.

    Missing inputs are listed on the page, not refused.

    Example: regen score-shapes --held-out runs/miniature/data/held_out --embedder runs/miniature/model
    --generated generated=runs/miniature/generated/guided --out runs/scores
    """
    from rich.console import Console

    from regen_dist.evaluation.miniature import SCORES, Request, judge_videos

    request = Request(
        held_out,
        embedder,
        _named(generated or [], "--generated"),
        _named(run or [], "--run"),
        number,
        previews,
        solvers,
    )
    with progress_bar() as progress:
        found = judge_videos(request, out, progress)
    console = Console()
    scores_table(found.report).show(console)
    for name, each in found.report["first_frames"].items():
        frames = f"{each['psnr_db']:.2f} dB, the embedder's {each['embedder_psnr_db']:.2f} dB"
        console.print(f"{name}: first frame given, {frames}; direction {each['direction']:.1%}", markup=False)
    for line in _of_rows(found):
        console.print(line, markup=False)
    for name, reason in found.report["not_made"].items():
        console.print(f"{name}: not made, {reason}", highlight=False, markup=False)
    console.print(f"Written: {out / SCORES}, {found.page}", highlight=False, markup=False, soft_wrap=True)
    missed = found.report["missed"]
    if require and missed:
        raise TrainingError(f"the targets are missed: {'; '.join(missed)}; {found.page} shows what was taken for what")


def _named(given: Sequence[str], option: str) -> dict[str, Path]:
    """Parse NAME=FOLDER to folders by name; without a name, the folder's own."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.name
        if not name or name in found:
            raise ConfigError(f"{option} {text}: give every folder its own name, as {option} NAME=FOLDER")
        found[name] = path
    return found


def scores_table(report: dict[str, Any]) -> Table:
    """Return the shares of scores.json with their intervals, one arm per row, targets last."""
    targets: dict[str, float] = report["targets"]
    rows = []
    for name, arm in report["arms"].items():
        scores = [arm["scores"][measure] for measure in targets]
        intervals = ((each["share"], *each["interval_95"]) for each in scores)
        shares = [f"{share:.1%} ({100 * low:.0f}–{100 * high:.0f})" for share, low, high in intervals]
        rows.append([name, f"{scores[0]['number']}", *shares])
    return Table(
        ["videos", *numbers("number", *targets)],
        rows,
        title="read right by a detector without learning, with 95 % intervals",
        footer=[["target", f"≥ {report['least_videos']}", *(f"≥ {target:.0%}" for target in targets.values())]],
        styles={number: "bold" for number, row in enumerate(rows) if row[0] == report["targets_are_for"]},
    )


def _of_rows(found: Judgement) -> Iterator[str]:
    """Yield a line for the continued videos and the seams of each arm."""
    for name, each in found.report["continued"].items():
        psnr = f"{each['psnr_db']:.2f} dB, the embedder's {each['embedder_psnr_db']:.2f} dB"
        still = f"the last given frame held {each['held_psnr_db']:.2f} dB"
        yield f"{name}: added frames {psnr}, {still}; direction {each['direction']:.1%}"
    for name, arm in found.report["arms"].items():
        if arm["seams"] is not None:
            yield f"{name}: seam ratio {arm['seams']['seam_ratio']:.2f}"
