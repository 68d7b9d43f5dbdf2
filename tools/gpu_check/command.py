"""`regen gpu-check`: the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from regen_dist.errors import BackendError
from regen_dist.jsontext import json_text

_CPU_PATIENCE = 4  # times the limits: CPUs are slower, and shared


def gpu_check(
    only: Annotated[
        list[str] | None, typer.Option(help="Run only this part (may be given more than once).", metavar="PART")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run everything on the CPU, at small sizes.")] = False,
    train: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="MINUTES", help="Train REGEN and its baseline too, so many minutes each."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for what --train makes.")] = Path("runs/gpu_check"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Check everything that a GPU does here, in about ten minutes, each part in a process of its own (docs/gpu.md).
    Ends with 0 only if no part failed.

    Parts: versions, attention, convolutions, optimizers, zero3, embedders, t2v-blocks, t2v-5b, ranks, tests; --train
    adds train, which --only need not name. One that the machine has no room for is left out, and says so.

    Example: regen gpu-check --train 20
    """
    from tools.gpu_check.parts import chosen_parts, training_part
    from tools.gpu_check.running import all_passed, run_part

    parts = chosen_parts(only)
    if not cpu:
        _require_cuda()
    more = [] if train is None else ["--minutes", str(train), "--folder", str(out)]
    results = []
    with TemporaryDirectory(prefix="regen-gpu-check-") as folder:
        for part in (*parts, *([] if train is None else [training_part(train)])):
            print(f"{part.name} …", end=" ", file=sys.stderr, flush=True)
            limit_s = part.limit_s * (_CPU_PATIENCE if cpu else 1)
            results.append(run_part(replace(part, limit_s=limit_s), Path(folder), cpu=cpu, arguments=more))
            print(f"{results[-1]['status']}, {results[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    passed = all_passed(results)
    print(json_text({"passed": passed, "cpu": cpu, "parts": results}, indent=1)) if as_json else _show(results)
    if not passed:
        raise typer.Exit(1)


def _require_cuda() -> None:
    """Refuse a machine on which nothing could be checked.

    Raises:
        BackendError: torch sees no CUDA device.
    """
    import torch

    if torch.cuda.is_available():
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    raise BackendError(
        f"this machine has no CUDA device that torch {torch.__version__} ({built}) can use, so there is nothing to "
        "check; see `nvidia-smi` and docs/gpu.md, or give --cpu to try the command itself at small sizes"
    )


def _show(results: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="regen gpu-check")
    table.add_column("part")
    table.add_column("result")
    table.add_column("s", justify="right")
    table.add_column("found", overflow="fold")
    styles = {"passed": "green", "failed": "bold red"}
    for result in results:
        status = result["status"]
        table.add_row(
            result["part"], status, f"{result['seconds']:.0f}", result["summary"], style=styles.get(status, "")
        )
    console = Console()
    console.print(table)
    for result in results:
        if "log" in result:
            console.print(f"{result['part']} printed at its end:\n{result['log']}", highlight=False, markup=False)
