"""`regen bench compression`: REGEN, its baseline and variants at equal training budgets, on real video."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tools import stages
from tools.bench.common import config_facts, only_one, opening_facts, split_arguments, write_record
from tools.shards.progress import stopping_cleanly

if TYPE_CHECKING:
    from regen_dist.config import EmbedderConfig
    from tools.bench.compression_measure import CropSize, TestSet
    from tools.bench.compression_runs import CompressionArm, Runs

_CONFIG = Path("configs/bench/compression.yaml")
_VIDEOS, _FILM, _TESTS = Path("runs/videos"), "bbb.mp4", ("bikes.mp4", "carphone.mp4")
_HELD_BACK_S = 60  # of the film's beginning: what learning rates are chosen on


def compression(
    config: Annotated[Path, typer.Argument(help="What every arm starts from.", metavar="[CONFIG]")] = _CONFIG,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the shards, the runs, the JSON and the page.")] = Path(
        "runs/compression"
    ),
    minutes_per_arm: Annotated[
        list[float] | None,
        typer.Option(help="Training time of an arm, on one core. Given several times: a table of curves.", min=0.001),
    ] = None,
    tests: Annotated[
        Path | None, typer.Option(help="Folder of videos to test on, instead of the listed clips.")
    ] = None,
    clips: Annotated[Path, typer.Option(help="List of the test clips.")] = Path("configs/bench/compression_clips.yaml"),
    arms: Annotated[str, typer.Option(help="Regular expression of the arms' names.", metavar="REGEX")] = ".*",
    at_once: Annotated[int, typer.Option(min=1, help="Arms that train side by side, one thread each.")] = 2,
    tune: Annotated[bool, typer.Option(help="Choose the learning rate of each kind by short runs first.")] = True,
    fvd: Annotated[
        Path | None,
        typer.Option(help="Network of video for the Fréchet distance (docs/evaluate.md); none: not measured."),
    ] = None,
    fresh_measures: Annotated[bool, typer.Option("--fresh-measures", help="Measure again what is measured.")] = False,
) -> None:
    """Train every arm for the same time, measure all on videos outside the training data, and write a page. Ten minutes
    per arm, the default, take about four hours on two cores.

    The same command continues where it stopped; finished trainings and measurements are not repeated. With several
    budgets, each has its own folder in `--out`, the shortest runs first, the longer ones take its learning rates, and
    curves.md is rewritten after each.

    Example: regen bench compression --arms 'regen-k16|magvit2-k16-linear' --minutes-per-arm 5 --minutes-per-arm 20
    """
    from regen_dist.evaluation.perceptual import load_features
    from tools.bench.compression_runs import chosen_arms

    budgets = sorted(set(minutes_per_arm or [10.0]))
    chosen, asked = chosen_arms(arms), split_arguments(config, overrides or [], _CONFIG)
    several = [
        _runs(*asked, out, out if len(budgets) == 1 else out / f"{each:g}_minutes", each, at_once) for each in budgets
    ]
    network = None if fvd is None else load_features(fvd, video=True).name  # refused now, not after hours
    with stopping_cleanly(), only_one(out):
        for runs in several:
            runs.claim(tune=tune)
        test_set = _test_set(tests, clips)
        _make_shards(several[0].base)
        for runs in several:
            if runs is not several[0]:
                runs.take_over(several[0].out)
            _one_budget(runs, chosen, test_set, tune, fvd, fresh_measures, network)
            if len(several) > 1:
                _write_curves(out, {each.minutes: each.out for each in several})


def _runs(config: Path, asked: Sequence[str], data: Path, out: Path, minutes: float, at_once: int) -> Runs:
    """Return the trainings of one budget in the folder `out`; the shards are in the folder `data`."""
    from rich.console import Console

    from regen_dist.config import load_embedder_config
    from tools.bench.compression_runs import Runs

    own = [f"data.url={data}/shards", f"data.validation_url={data}/tuning"]
    own += [f"engine.precision={stages.working_precision()}", *asked, "engine.kind=plain", f"output={out}/arms"]
    base = load_embedder_config(config, own)
    return Runs(config, tuple(own), base, out, minutes, at_once, Console(stderr=True).print)


def _one_budget(
    runs: Runs,
    chosen: list[CompressionArm],
    tests: TestSet,
    tune: bool,
    fvd: Path | None,
    fresh: bool,
    network: str | None,
) -> None:
    """Train and measure all arms at one budget, and write its record and page."""
    from tools.bench.compression_measure import sizes_of

    facts, sizes = opening_facts(), sizes_of(runs.base)
    runs.pace(chosen, tune=tune)
    tuning = runs.tune(chosen, tune=tune)
    runs.train(chosen, tuning)
    loads = {"before": facts.pop("load_before"), "after_training": os.getloadavg()}
    measures = _measure(runs, chosen, tests, sizes, fvd, fresh)
    facts |= config_facts(runs.config, runs.own, runs.base)
    facts |= {"minutes_per_arm": runs.minutes, "at_once": runs.at_once, "load": loads | {"after": os.getloadavg()}}
    facts |= {"sizes": {name: size._asdict() for name, size in sizes.items()}, "tests": tests.facts()}
    facts |= {"tuning": tuning, "fvd": network}
    facts["arms"] = {arm.name: {**runs.facts(arm), "measures": measures[arm.name]} for arm in chosen}
    _write(runs.out, facts, {arm.name: runs.kept(arm).with_suffix(".npz") for arm in chosen})


def _write_curves(out: Path, folders: Mapping[float, Path]) -> None:
    from regen_dist.config.files import write_text_atomically
    from tools.bench.compression_report import budgets_markdown, read_budgets

    text = budgets_markdown(read_budgets(folders))
    write_text_atomically(out / "curves.md", text)
    print(text)


def _make_shards(base: EmbedderConfig) -> None:
    """Build missing datasets of the config: training on the film without its beginning, validation on its beginning."""
    from regen_dist.data.format.manifest import MANIFEST

    train, tuning, side = base.data.url, base.data.validation_url, base.data.short_side
    parts = ((train, ["--start-seconds", f"{_HELD_BACK_S}"]), (tuning, ["--max-seconds", f"{_HELD_BACK_S}"]))
    missing = [(url, part) for url, part in parts if url and "://" not in url and not (Path(url) / MANIFEST).is_file()]
    if missing:
        stages.run(["fetch-videos", "--out", str(_VIDEOS), "--only", _FILM])
    for url, part in missing:
        film = str(_VIDEOS / _FILM)
        stages.run(["shards", "build", film, "--out", str(url), "--short-side", str(side), *part])


def _test_set(tests: Path | None, clips: Path) -> TestSet:
    from tools.bench.compression_measure import find_clips, load_clips

    if tests is not None:
        return find_clips(tests)
    stages.run(["fetch-videos", "--out", str(_VIDEOS), *(each for name in _TESTS for each in ("--only", name))])
    return load_clips(clips, _VIDEOS)


def _measure(
    runs: Runs,
    chosen: list[CompressionArm],
    tests: TestSet,
    sizes: Mapping[str, CropSize],
    fvd: Path | None,
    fresh: bool,
) -> dict[str, Any]:
    """Measure every arm, several arms at a time."""
    from functools import partial

    from regen_dist.data.pool import worker_pool
    from tools.bench.compression_measure import measure_arm

    found = {}
    with worker_pool(runs.at_once) as pool:
        threads = max(1, len(os.sched_getaffinity(0)) // runs.at_once)
        measure = partial(measure_arm, fvd=fvd, fresh=fresh, threads=threads)
        given = {arm: (runs.folder(arm), tests, sizes, runs.kept(arm), arm.steps) for arm in chosen}
        for arm, measures in pool.run(measure, given.items()):
            runs.log(f"measured: {arm.name}")
            found[arm.name] = measures
    return found


def _write(out: Path, facts: dict[str, Any], kept: Mapping[str, Path]) -> None:
    """Write JSON, plots, tables and page."""
    from tools.bench.compression_report import draw, margins, markdown, missed, write_page

    facts |= {"margins": margins(facts), "missed": missed(facts)}
    plots, text = draw(facts), markdown(facts)
    (out / "plots").mkdir(exist_ok=True)
    for plot in plots:
        (out / "plots" / f"{plot.name}.svg").write_text(plot.file, encoding="utf-8")
    print(f"written: {write_page(out, facts, plots, kept)}", file=sys.stderr)
    write_record(out, "compression", facts, text)
