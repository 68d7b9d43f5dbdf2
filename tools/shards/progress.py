"""Progress bar, clean stops and task numbers for the long commands of `regen shards`."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.errors import EXIT_RESUME, ConfigError

if TYPE_CHECKING:
    from regen_dist.data.pool import Progress

Workers = Annotated[
    int | None, typer.Option(min=0, max=1024, help="Processes; all cores by default, 0 works in this process.")
]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a live bar on stderr, one line per stage."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Recent progress per second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description:<7}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield show


# Stop requests in the long commands of `regen shards`.
_AGAIN_S = 0.05


@contextmanager
def stopping_cleanly(*, continues: bool = True) -> Iterator[None]:
    """End the command immediately on Ctrl-C or a batch system's signal: files are complete or absent. Exit code 75.

    Args:
        continues: the same command goes on with what is there; false if it begins anew.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _resend_lost_signals():
            yield
    except KeyboardInterrupt:
        kept = "Finished files are kept; run the same command again to continue."
        print(f"Stopped. {kept if continues else 'The same command begins anew.'}", file=sys.stderr)
        raise typer.Exit(EXIT_RESUME) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _resend_lost_signals() -> Iterator[None]:
    """Send a signal again shortly after if its exception was raised in a destructor, where Python drops exceptions."""
    previous_hook, main = sys.unraisablehook, threading.main_thread().ident or 0
    again: list[threading.Timer] = []

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            previous_hook(lost)
            return
        again.append(threading.Timer(_AGAIN_S, signal.pthread_kill, (main, signal.SIGTERM)))
        again[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        for timer in again:
            timer.cancel()
            timer.join()


# `--task`: this process's part of shared work.
def parse_task(text: str, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Parse "I/N" (I counts from 0), or "slurm": both from the Slurm array of this process.

    Raises:
        ConfigError: it is neither, I is not below N, or there is no Slurm array.
    """
    number, count = _slurm(environ) if text == "slurm" else _written(text)
    if not 0 <= number < count:
        raise ConfigError(f"--task {number}/{count}: {count} tasks are numbered 0 to {count - 1}")
    return number, count


def _written(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
    if not match:
        raise ConfigError(f"--task {text}: write I/N, as 0/8 for the first of eight, or slurm inside a Slurm array")
    return int(match[1]), int(match[2])


def _slurm(environ: Mapping[str, str]) -> tuple[int, int]:
    """Read the array index of this task, for arrays with any start and step: --array=4-10:2 has four tasks."""
    try:
        number, first, count = (int(environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT"))
        step = int(environ.get("SLURM_ARRAY_TASK_STEP", "1"))
    except (KeyError, ValueError):
        raise ConfigError(
            "--task slurm: SLURM_ARRAY_TASK_ID, _MIN and _COUNT are not set; submit with sbatch --array=0-7, or "
            "give --task I/N"
        ) from None
    place = (number - first) // step
    if not 0 <= place < count:
        raise ConfigError(
            f"--task slurm: array task {number} is not one of {count} from {first} in steps of {step}: an array with "
            f"gaps cannot share the work; submit with sbatch --array=0-{count - 1}, or one task alone, which makes all "
            "that is missing"
        )
    return place, count


# `regen shards frames`: lossless videos from folders of pictures and raw files.


def frames(
    source: Annotated[Path, typer.Argument(help="Folder with folders of pictures, or with .yuv files.")],
    out: Annotated[Path, typer.Option(help="Folder of the videos; existing ones are kept.")],
    fps: Annotated[float | None, typer.Option(help="Frames a second; NAME_WIDTHxHEIGHT_FPS.yuv says its own.")] = None,
) -> None:
    """Encode every folder of pictures and every raw YUV 4:2:0 file below a folder as a lossless video.

    Example: regen shards frames DAVIS/JPEGImages/480p --out runs/davis --fps 24
    """
    from regen_dist.data.build.build import assemble, sequences_below
    from regen_dist.errors import DataError

    if not source.is_dir():
        raise DataError(f"{source}: no such folder; give the folder of the pictures")
    out.mkdir(parents=True, exist_ok=True)
    named: dict[Path, Path] = {}
    for one in sequences_below(source):
        relative = one.relative_to(source)
        name = "-".join(relative.with_suffix("").parts if one.is_file() else relative.parts) or source.resolve().name
        target = out / f"{name}.mkv"
        if (other := named.setdefault(target, one)) is not one:
            raise DataError(f"{other} and {one} would both become {target}; rename one of them")
    for target, one in named.items():
        if target.exists():
            typer.echo(f"{target}: is there")
        else:
            typer.echo(f"{target}: {assemble(one, target, fps)} frames")
