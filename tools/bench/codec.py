"""`regen bench codec`: what encoding and decoding costs, beside the codecs that a user would take instead."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.jsontext import json_text
from tools import stages
from tools.shards.stopping import stopping_cleanly

if TYPE_CHECKING:
    from regen_dist.evaluation.codec_cost.systems import System

_SIZES = ["17x64x64", "33x64x64", "17x128x128"]
_COUNTED = ["17x256x256", "33x512x512"]


def codec(
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the table.")] = Path("runs/bench/codec"),
    size: Annotated[
        list[str] | None,
        typer.Option(help=f"A clip that passes through, FRAMESxHEIGHTxWIDTH; several times. [{', '.join(_SIZES)}]"),
    ] = None,
    counted: Annotated[
        list[str] | None,
        typer.Option(help=f"A clip whose operations are counted without running it. [{', '.join(_COUNTED)}]"),
    ] = None,
    systems: Annotated[str, typer.Option(help="Regular expression: the codecs that take part.")] = ".",
    repeats: Annotated[int, typer.Option(help="Passes of each that are timed, after a first.", min=0)] = 2,
    rounds: Annotated[int, typer.Option(help="How often all of it is done, by new processes.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Of every codec.", min=1)] = 1,
    limit_seconds: Annotated[float, typer.Option(help="Of one codec at one size, loading included.", min=1.0)] = 300.0,
    limit_gib: Annotated[float, typer.Option(help="Of memory that one codec may take.", min=0.5)] = 12.0,
    packages: Annotated[
        Path | None, typer.Option(help="Folder with packages that are not installed, such as magvit2-pytorch.")
    ] = None,
) -> None:
    """Measure what encoding and decoding the same clip costs: this project's codecs (full, fast, nano), those of
    diffusers and magvit2-pytorch, with random weights, one process for each. A codec that is not installed, or takes
    more than the limits, is a row that says so.

    Example: regen bench codec --size 17x64x64 --systems 'fast|Cosmos'
    """
    from rich.console import Console

    from regen_dist.config import config_hash
    from regen_dist.config.files import write_text_atomically
    from regen_dist.evaluation.codec_cost.report import table
    from regen_dist.evaluation.codec_cost.sizes import parse_size
    from regen_dist.evaluation.codec_cost.suite import Limits, measure_all
    from regen_dist.evaluation.codec_cost.systems import chosen
    from regen_dist.observe.hardware import describe_machine

    console, found = Console(stderr=True), chosen(systems)
    run, count = ([parse_size(text) for text in texts] for texts in (size or _SIZES, counted or _COUNTED))
    limits = Limits(
        limit_seconds,
        limit_gib,
        threads,
        repeats,
        stages.working_precision(),
        str(packages.resolve()) if packages else "",
    )
    facts: dict[str, Any] = {"command": " ".join(["regen", *sys.argv[1:]]), "machine": describe_machine()}
    facts |= {"versions": _versions(packages), "threads": threads, "precision": limits.precision, "repeats": repeats}
    facts |= {"rounds": rounds, "limit_seconds": limit_seconds, "limit_gib": limit_gib, "load_before": os.getloadavg()}
    facts |= {"config_hashes": {name: config_hash(config) for name, config in _configs(found).items()}}
    out.mkdir(parents=True, exist_ok=True)
    with stopping_cleanly():
        facts["rows"] = measure_all(found, run, count, limits, rounds=rounds, told=console.print)
    facts["load_after"] = os.getloadavg()
    write_text_atomically(out / "codec.json", json_text(facts, indent=1) + "\n")
    write_text_atomically(out / "codec.md", table(facts))
    print(table(facts))
    console.print(f"written: {out / 'codec.json'}, {out / 'codec.md'}")


def _configs(systems: list[System]) -> dict[str, Any]:
    from regen_dist.evaluation.codec_cost.ours import own_config
    from regen_dist.evaluation.codec_cost.systems import CONFIGS

    return {each.name: own_config(CONFIGS / f"{each.name}.yaml", "fp32") for each in systems if each.is_own}


def _versions(packages: Path | None) -> dict[str, str]:
    """Of the packages that are compared with."""
    from importlib.metadata import distributions

    places = [*sys.path, *([str(packages)] if packages else [])]
    found = {each.metadata["Name"]: each.version for each in distributions(path=places)}
    return {name: found.get(name, "not installed") for name in ("diffusers", "magvit2-pytorch")}
