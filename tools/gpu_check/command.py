"""`regen gpu-check`: the command-line interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from launcher.supervise import die_with, rank_environment
from regen_dist.errors import BackendError, ConfigError
from regen_dist.jsontext import json_text
from regen_dist.programs import python
from regen_dist.tables import Table, numbers
from tools.bench.common import claim_minutes
from tools.shards.progress import stopping_cleanly

_CPU_PATIENCE = 10  # times the limits: CPUs are slower, and shared


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
    """Check everything that a GPU does here, in about ten minutes, each part in its own process (docs/gpu.md). Exit
    code 0 only if no part failed.

    Parts: versions, attention, convolutions, optimizers, zero3, embedders, t2v-blocks, t2v-5b, ranks, tests; --train
    adds train, which --only need not name. One that the machine has no room for is left out, and says so.

    Example: regen gpu-check --train 20
    """
    parts = chosen_parts(only)
    if not cpu:
        _require_cuda()
    if train is not None:
        claim_minutes(out, train, "--train")
    more = [] if train is None else ["--minutes", str(train), "--folder", str(out)]
    results = []
    with stopping_cleanly(continues=train is not None), TemporaryDirectory(prefix="regen-gpu-check-") as folder:
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

    styles = {"passed": "green", "failed": "bold red"}
    console = Console()
    Table(
        ["part", "result", *numbers("s"), "found"],
        [(each["part"], each["status"], f"{each['seconds']:.0f}", each["summary"]) for each in results],
        title="regen gpu-check",
        styles={number: styles.get(each["status"], "") for number, each in enumerate(results)},
    ).show(console)
    for result in results:
        if "log" in result:
            console.print(f"{result['part']} printed at its end:\n{result['log']}", highlight=False, markup=False)


# Parts of `regen gpu-check`: name, purpose and timeout. Imports no torch.


@dataclass(frozen=True)
class Part:
    """One part, which runs in a process of its own.

    Args:
        name: name for `--only`.
        function: function that runs it, `module:name` below `tools.gpu_check`.
        proves: fact that it proves, in one line (more in docs/gpu.md).
        limit_s: timeout in seconds, after which it counts as failed.
    """

    name: str
    function: str
    proves: str
    limit_s: float = 120.0


PARTS = (
    Part("versions", "machine:versions", "driver, CUDA, cuDNN, NCCL; a group of one rank and its gloo twin"),
    Part("attention", "numerics:attention", "every kernel against the textbook, forward and backward; TFLOP/s"),
    Part("convolutions", "numerics:convolutions", "bf16 Conv3d against float32, beyond 1.8e9 elements too"),
    Part("optimizers", "numerics:optimizers", "fused AdamW and FusedAdam against AdamW, saved and resumed"),
    Part("zero3", "zero3:zero3", "ZeRO-3 of one rank against the plain engine; prefetch; save and restore", 180.0),
    Part("embedders", "speed:embedders", "clips/s of encoder and decoder, profile, synchronisations of a step", 180.0),
    Part("t2v-blocks", "speed:t2v_blocks", "eight blocks of the 5B transformer: MFU and HFU"),
    Part("t2v-5b", "speed:t2v_5b", "the whole 5B model, one row: peak memory against `regen describe`", 180.0),
    Part("ranks", "worker:ranks", "a rank that raises amid a collective ends the job in seconds, with its traceback"),
    Part("tests", "machine:tests", "the tests that are marked `cuda`", 180.0),
)

_TRAIN_S, _ARMS = 900.0, 4  # beside the minutes themselves: the film, probes, measuring
_REPEATED = 2.5  # times its minutes that an arm may take, whose first trainings were too short


def training_part(minutes: float) -> Part:
    """Return the part that `--train` adds: REGEN and its baseline at two compressions, this many minutes each."""
    proves = "REGEN and its baseline at k = 16 and 32: one-step PSNR on filmed video that none was trained on"
    return Part("train", "speed:training", proves, _TRAIN_S + _ARMS * 60 * minutes * _REPEATED)


def chosen_parts(names: list[str] | None) -> tuple[Part, ...]:
    """Return the parts of these names in their defined order; all by default.

    Raises:
        ConfigError: there is no such part.
    """
    known = [part.name for part in PARTS]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ConfigError(f"--only {', '.join(unknown)}: no such part; there are {', '.join(known)}")
    return tuple(part for part in PARTS if not names or part.name in names)


# Runs parts of `regen gpu-check`, each in a process of its own that is ended when its time is over. Imports no
# torch.

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"
_TAIL_LINES = 12


def run_part(part: Part, folder: Path, *, cpu: bool, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Run a part in its own process and return its result.

    Args:
        part: part to run.
        folder: folder of its log and outputs.
        cpu: run on the CPU at small sizes, even if there is a GPU.
        arguments: further arguments of the worker.

    Returns:
        `part`, `status` (passed, failed or left out), `summary`, `seconds`, `proves`, `facts`; of one that failed also
        `log`, the end of what it printed.
    """
    out, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    command = python("-m", "tools.gpu_check.worker", part.function, "--out", str(out), *(["--cpu"] if cpu else []))
    begun = time.monotonic()
    code = _ended([*command, *arguments], _environment(cpu), log, part.limit_s)
    found = _found(out, code, part.limit_s)
    result = {"part": part.name, **found, "seconds": time.monotonic() - begun, "proves": part.proves}
    if found["status"] == FAILED:
        result["log"] = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
    return result


def all_passed(results: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether no part failed and not all were left out."""
    statuses = [result["status"] for result in results]
    return PASSED in statuses and FAILED not in statuses


def _environment(cpu: bool) -> dict[str, str]:
    """Return the environment of a single-rank job."""
    common = rank_environment(os.environ, 1)
    return {**common, "CUDA_VISIBLE_DEVICES": ""} if cpu else common


def _ended(command: Sequence[str], environment: Mapping[str, str], log: Path, limit_s: float) -> int | None:
    """Return the exit code; None if it timed out and was killed with all its descendants."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with(os.getpid()),
        )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _found(out: Path, code: int | None, limit_s: float) -> dict[str, Any]:
    if code is None:
        return {"status": FAILED, "summary": f"not done after {limit_s:.0f} s, and ended", "facts": {}}
    if code < 0:
        return {"status": FAILED, "summary": f"ended by {signal.Signals(-code).name}", "facts": {}}
    if code or not out.is_file():
        return {"status": FAILED, "summary": f"ended with exit code {code} and without a result", "facts": {}}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found
