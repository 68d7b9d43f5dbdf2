"""`regen check`: validation of a run without starting it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.errors import EXIT_OK, ConfigError
from regen_dist.jsontext import json_text
from regen_dist.tables import Table

if TYPE_CHECKING:
    from regen_dist.checks.findings import Finding, Target


def check(
    config: Annotated[
        Path, typer.Argument(help="YAML file of a run, of pre-encoding or of a pipeline.", metavar="CONFIG")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Config overrides, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks of the run.")] = 1,
    gpus: Annotated[
        bool | None, typer.Option("--gpus/--no-gpus", help="Whether ranks have GPUs [default: as this machine].")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="It is to start from scratch where checkpoints are lost.")] = (
        False
    ),
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="The run uses another Python, whose packages cannot be inspected here.")
    ] = False,
    produced: Annotated[
        list[str] | None,
        typer.Option(help="Location that will exist by then; repeatable.", metavar="URL"),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(help="Config of another run to check as well; repeatable.", metavar="CONFIG"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Check a config as `regen train` or `regen preencode` would at its start: the config itself, data, kernels, batch
    and ranks, and whether the run can resume from its checkpoints. Nothing is written, nothing is trained.

    Exit code: 0 if there are no problems, otherwise that of the run.

    Example: regen check configs/embedder/nano.yaml --world-size 2 data.url=runs/shapes data.validation_url=null
    """
    from regen_dist.checks.findings import Target

    target = Target(world_size, gpus, not elsewhere, produced or (), fresh)
    found = _check([config, *(also or [])], overrides or [], target)
    if as_json:
        print(json_text(_to_json(found), indent=1))
    else:
        _print(found)
    wrong = [each for findings in found.values() for each in findings if each.level == "error"]
    raise typer.Exit(wrong[0].exit_code if wrong else EXIT_OK)


def _check(paths: Sequence[Path], overrides: Sequence[str], target: Target) -> dict[str, tuple[Finding, ...]]:
    """Return the findings by config file or pipeline step."""
    from regen_dist.checks.findings import error
    from regen_dist.checks.run import check_runs
    from regen_dist.config import AnyRunConfig, load_config
    from regen_dist.config.files import compose

    found: dict[str, tuple[Finding, ...]] = {}
    runs: dict[str, AnyRunConfig] = {}
    for path in paths:
        found[str(path)] = ()
        try:
            values = compose(path, overrides).values
            if "steps" in values:
                found |= _pipeline(path, overrides, target)
            elif "embedder" in values and "output" in values and "model" not in values:
                found[str(path)] = _preencode(path, overrides, target)
            else:
                runs[str(path)] = load_config(path, overrides)
        except ConfigError as caught:
            found[str(path)] = tuple(error(key, text) for key, text in _problems(str(caught)))
    return found | dict(zip(runs, check_runs(list(runs.values()), target), strict=True))


def _problems(message: str) -> list[tuple[str, str]]:
    """Split the combined message of a config error into key and text of each problem."""
    parts = [line.strip().split(": ", 2) for line in message.splitlines()[1:]]
    listed = [(key, f"{where}: {text}") for where, key, text in (part for part in parts if len(part) == 3)]
    return listed or [("", message)]


def _preencode(path: Path, overrides: Sequence[str], target: Target) -> tuple[Finding, ...]:
    from regen_dist.checks.run import check_preencode
    from regen_dist.config.preencode import load_preencode_config

    return check_preencode(load_preencode_config(path, tuple(overrides)), target)


def _pipeline(path: Path, overrides: Sequence[str], target: Target) -> dict[str, tuple[Finding, ...]]:
    """Check every training and pre-encoding of a pipeline; outputs of earlier steps need not exist yet."""
    from dataclasses import replace

    from launcher.pipelines.schema import load_pipeline
    from regen_dist.config import load_config

    found: dict[str, tuple[Finding, ...]] = {str(path): ()}
    made = [*target.produced]
    for name, step in load_pipeline(path, overrides).steps.items():
        command, then = step.command or (), replace(target, produced=tuple(made))
        config: Path | None = None
        changes: tuple[str, ...] = ()
        if step.train:
            config, changes = step.train, step.overrides
            made.append(str(load_config(config, changes).folder))
        elif command[:1] == ("preencode",) and len(command) > 1:
            config, changes = _preencode_arguments(command[1:])
        if config is not None:
            for _, findings in _check([config], changes, then).items():
                found[f"{path} {name}"] = findings
        made += [output.split("/manifest.json")[0] for output in step.outputs]
    return found


def _preencode_arguments(words: Sequence[str]) -> tuple[Path | None, tuple[str, ...]]:
    """Return config and overrides of a `regen preencode`, told from its options and their values as the command itself
    does; without those that `{task}` makes different for each task."""
    from typer.main import get_command

    from tools.preencode import preencode

    app = typer.Typer()
    app.command()(preencode)
    given = get_command(app).make_context("preencode", list(words), resilient_parsing=True).params
    config, overrides = given.get("config"), given.get("overrides") or ()
    fixed = None if config is None or "{" in str(config) else Path(config)
    return fixed, tuple(each for each in overrides if "{" not in each)


def _to_json(found: dict[str, tuple[Finding, ...]]) -> dict[str, Any]:
    """Return `ok` and `findings` overall and for each config by path."""

    def one(findings: Sequence[Finding]) -> dict[str, Any]:
        listed = [each.to_json() for each in findings]
        return {"ok": all(each["level"] != "error" for each in listed), "findings": listed}

    whole = one([each for findings in found.values() for each in findings])
    return whole | {"configs": {path: one(findings) for path, findings in found.items()}}


def _print(found: dict[str, tuple[Finding, ...]]) -> None:
    from rich.console import Console

    console = Console()
    for path, findings in found.items():
        if not findings:
            console.print(f"{path}: nothing is wrong", highlight=False, markup=False, soft_wrap=True)
            continue
        rows = [(each.level, each.key, each.message, each.fix) for each in findings]
        wrong = {number: "red" for number, each in enumerate(findings) if each.level == "error"}
        Table(("level", "key", "what is wrong", "fix"), rows, title=path, styles=wrong, frame="light").show(console)
