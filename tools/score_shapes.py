"""`regen score-shapes`: scores of generated moving-shapes videos by a detector without learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.errors import ConfigError, TrainingError
from tools.shards.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from regen_dist.evaluation.miniature import Judgement


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

    Example: regen score-shapes --held-out runs/miniature/held_out --embedder runs/miniature/embedder
    --generated generated=runs/miniature/generated --out runs/miniature/report
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
    console.print(_table(found))
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


def _of_rows(found: Judgement) -> Iterator[str]:
    """Yield a line for the continued videos and the seams of each arm."""
    for name, each in found.report["continued"].items():
        psnr = f"{each['psnr_db']:.2f} dB, the embedder's {each['embedder_psnr_db']:.2f} dB"
        still = f"the last given frame held {each['held_psnr_db']:.2f} dB"
        yield f"{name}: added frames {psnr}, {still}; direction {each['direction']:.1%}"
    for name, arm in found.report["arms"].items():
        if arm["seams"] is not None:
            yield f"{name}: seam ratio {arm['seams']['seam_ratio']:.2f}"


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


def _table(found: Judgement) -> Table:
    """Return the shares with their intervals, one arm per row, targets last."""
    from rich.table import Table

    from regen_dist.evaluation.miniature import LEAST_VIDEOS, MEASURES, TARGETS

    table = Table(title="read right, with 95 % intervals")
    table.add_column("videos")
    for name in ("number", *MEASURES):
        table.add_column(name, justify="right")
    for arm in found.arms:
        scores = arm.scores
        shares = [f"{scores[name].value:.1%} ({_interval(scores[name])})" for name in MEASURES]
        style = "bold" if arm.name == found.report["targets_are_for"] else ""
        table.add_row(arm.name, str(len(arm.videos)), *shares, style=style)
    table.add_section()
    table.add_row("target", f"≥ {LEAST_VIDEOS}", *(f"≥ {TARGETS[name]:.0%}" for name in MEASURES))
    return table


def _interval(share: Any) -> str:
    low, high = share.interval()
    return f"{100 * low:.0f}–{100 * high:.0f}"
