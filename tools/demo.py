"""`regen demo`: the whole pipeline from video files to a reconstructed clip, through the user's commands."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.errors import RegenError
from tools import stages

if TYPE_CHECKING:
    from regen_dist.config import EmbedderConfig

# Training video: an animated film. Test video: filmed street scenes with fast motion and cuts.
TRAIN_VIDEO, HELD_OUT_VIDEO = "bbb.mp4", "bikes.mp4"
# Frame size in pixels: at 64, an 8x8 cell would be an eighth of the picture and the first frame the bottleneck.
SHORT_SIDE = 128
STEPS = (1, 4)
# In place of those of the config, on a CPU without bf16: a step takes several times as long there.
FP32_TRAIN_STEPS = 400


@dataclass(frozen=True)
class _OutputPaths:
    """Paths of the demo's outputs."""

    videos: Path
    run: Path
    reconstructions: tuple[Path, ...]
    report: Path


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="Config overrides, as a.b=value.")] = None,
    config: Annotated[Path, typer.Option(help="Config to train.")] = Path("configs/demo/embedder.yaml"),
    videos: Annotated[Path, typer.Option(help="Folder of the fetched videos.")] = Path("runs/videos"),
    ranks: Annotated[int, typer.Option(min=1, help="Training processes.")] = 2,
) -> None:
    """Fetch real video, build shards, train on two ranks, stop and resume once, reconstruct a held-out video, report.

    The same command continues where it stopped and skips finished stages. Fails if a trivial decoder does as well.

    Example: regen demo
    """
    from regen_dist.config import load_embedder_config

    began = time.monotonic()
    overrides = [*_machine_overrides(), *(overrides or [])]
    loaded = load_embedder_config(config, overrides)
    base = Path(loaded.output)
    names = [f"{steps}_step{'s' if steps > 1 else ''}" for steps in STEPS]
    run = base / loaded.name
    paths = _OutputPaths(videos, run, tuple(base / "reconstructions" / name for name in names), base / "report")
    stages.run(["fetch-videos", "--out", str(videos), "--only", TRAIN_VIDEO, "--only", HELD_OUT_VIDEO])
    _build_shards(loaded, videos)
    _train(["train", str(config), "--ranks", str(ranks), *overrides], loaded, paths.run)
    _reconstruct(paths)
    _print_summary(paths, time.monotonic() - began)


def _machine_overrides() -> list[str]:
    """Return the overrides without which the demo would take hours on this machine."""
    if stages.working_precision() == "bf16":
        return []
    steps = FP32_TRAIN_STEPS
    print(f"This CPU has no native bf16 multiplication: the demo trains in float32, for {steps} steps.", flush=True)
    return ["engine.precision=fp32", f"train.steps={steps}"]


def _build_shards(config: EmbedderConfig, videos: Path) -> None:
    train, held_out = config.data.url, config.data.validation_url
    if train is None or held_out is None:
        raise RegenError("the demo needs data.url and data.validation_url in its config: the shards go there")
    for video, url in ((TRAIN_VIDEO, train), (HELD_OUT_VIDEO, held_out)):
        stages.run(["shards", "build", str(videos / video), "--out", url, "--short-side", str(SHORT_SIDE)])


def _train(arguments: Sequence[str], config: EmbedderConfig, run: Path) -> None:
    """Train to the end; the first time, stop half-way by the file STOP and resume by the same command."""
    total = config.train.steps
    if stages.last_step(run) >= total:
        stages.announce(arguments)
        print(f"skipped: {run} has all its {total} steps")
        return
    stages.run_stopping_once(arguments, run, None if stages.was_resumed(run) else total // 2)


def _reconstruct(paths: _OutputPaths) -> None:
    video, record = paths.videos / HELD_OUT_VIDEO, paths.run / "metrics.jsonl"
    for steps, out in zip(STEPS, paths.reconstructions, strict=True):
        arguments = ["reconstruct", str(video), "--run", str(paths.run), "--out", str(out), "--steps", str(steps)]
        arguments += ["--short-side", str(SHORT_SIDE), *(["--compare"] if steps == STEPS[0] else [])]
        metrics = out / "metrics.json"
        if metrics.is_file() and metrics.stat().st_mtime > record.stat().st_mtime:
            stages.announce(arguments)
            print(f"skipped: {metrics} is newer than the training")
        else:
            stages.run(arguments)


def _print_summary(paths: _OutputPaths, seconds: float) -> None:
    """Print the table, write the page, and fail if a trivial decoder does as well as one decoder step."""
    from rich.console import Console

    from regen_dist.evaluation.report import decoders_table, read_metrics, trivial_decoders, write_report

    reports = [read_metrics(folder) for folder in paths.reconstructions]
    title = f"REGEN, re-generating {HELD_OUT_VIDEO}"
    page = write_report(paths.report, title=title, run=paths.run, reconstructions=paths.reconstructions)
    console = Console()
    console.print()
    decoders_table(reports, f"{HELD_OUT_VIDEO}, never trained on").show(console)
    if learned := _learned(paths.run):
        console.print(learned, highlight=False)
    console.print(f"{seconds / 60:.1f} minutes. The page: {page}", highlight=False, markup=False)
    first = reports[0]
    better = [each for each in trivial_decoders(reports) if each["psnr_db"] >= first["psnr_db"]]
    if better:
        names = ", ".join(f"{each['label']} ({each['psnr_db']:.2f} dB)" for each in better)
        raise RegenError(f"{first['label']} has {first['psnr_db']:.2f} dB; it is not better than: {names}")


def _learned(run: Path) -> str:
    """Return a sentence on the gain over the linear start, by the recorded validations; empty with fewer than two."""
    from regen_dist.observe.record import read_record

    lines = [line for line in read_record(run / "metrics.jsonl") if line["kind"] == "validation"]
    if len(lines) < 2:
        return ""
    first, last = (line["psnr_db"] for line in (lines[0], lines[-1]))
    start, end = (line["step"] for line in (lines[0], lines[-1]))
    return (
        f"One-step PSNR on the validation clip: {first:.2f} dB at step {start}, where training starts from the linear "
        f"code; {last:.2f} dB at step {end}: {last - first:+.2f} dB."
    )
