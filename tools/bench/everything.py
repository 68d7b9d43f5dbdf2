"""`regen bench all`: every speed bench at short settings, and regressions since an old record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.errors import EXIT_RESUME, ConfigError, DataError, TrainingError
from regen_dist.jsontext import json_text
from tools import stages

if TYPE_CHECKING:
    from tools.bench.common import Declared


class SpeedBench(StrEnum):
    """Speed benches; the others measure quality for hours."""

    CHECKPOINT = "checkpoint"
    CODEC = "codec"
    DATA = "data"
    STEP = "step"
    T2V = "t2v"


_SHORT = {  # settings with which each takes a few minutes
    SpeedBench.CHECKPOINT: ["--no-bucket", "--rounds=1", "--repeats=1"],
    SpeedBench.CODEC: ["--size=17x64x64", "--counted=17x64x64", "--repeats=1"],
    SpeedBench.DATA: ["--synthetic", "--only=clips", "--only=small", "--seconds=2", "--repeats=3"],
    SpeedBench.STEP: ["--only=utilisation", "--only=memory", "--steps=2", "--repeats=3"],
    SpeedBench.T2V: ["--videos=64", "--seconds=5", "--repeats=2"],
}
_FILE = "all.json"


def everything(
    further: Annotated[
        list[str] | None,
        typer.Argument(help="After `--`: options of the bench that --only names, not the short ones."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("runs/bench/all"),
    only: Annotated[list[SpeedBench] | None, typer.Option(help="Run this alone; may be given again.")] = None,
    compare: Annotated[Path | None, typer.Option(help="An old all.json: print what changed since.")] = None,
    new: Annotated[Path | None, typer.Option(help="With --compare: this all.json, and run nothing.")] = None,
    require: Annotated[bool, typer.Option("--require", help="End with code 6 where a figure got worse.")] = False,
) -> None:
    """Run the benches of speed at short settings into one JSON, and compare it with an older one: each figure old and
    new, and which changed by more than it does by itself. Takes twenty minutes on two cores.

    Examples:

    regen bench all --only step --only t2v --compare old/all.json

    regen bench all --compare old/all.json --new runs/bench/all/all.json --require
    """
    from tools.bench.common import only_one

    if new is not None and (compare is None or only or further):
        raise ConfigError(
            "--new is compared as it is with an old record, and nothing runs; give that as --compare OLD.json, and "
            "leave out --only and options after --"
        )
    chosen = only or list(SpeedBench)
    if further and len(chosen) > 1:
        raise ConfigError(f"options after -- go to one bench, {len(chosen)} are chosen; name one with --only")
    old = None if compare is None else _read(compare)  # before anything runs for nothing
    if new is None:
        with only_one(out):
            found = _run(chosen, further or [], out)
    else:
        found = _read(new)
    if old is not None:
        worse = _compared(old, found)
        if worse and require:
            raise TrainingError(f"{worse} figure{'s' if worse > 1 else ''} got worse")


def _run(chosen: Sequence[SpeedBench], further: Sequence[str], out: Path) -> dict[str, Any]:
    """Return the facts of each bench, written as they arrive, beside those of other benches that are there."""
    from regen_dist.config.files import write_text_atomically

    found: dict[str, Any] = {}
    kept = _read(out / _FILE) if (out / _FILE).exists() else {}
    for bench in chosen:
        folder = out / bench
        arguments = ["bench", bench.value, *(further or _SHORT[bench]), f"--out={folder}"]
        print(f"$ regen {' '.join(arguments)}", flush=True)
        code = stages.run_until(arguments, folder, None).code
        if code == EXIT_RESUME:
            raise typer.Exit(code)  # a signal
        if code:
            raise TrainingError(f"the bench {bench} ended with exit code {code}; leave it out with --only, or fix it")
        found[bench.value] = _json(folder / f"{bench}.json")
        write_text_atomically(out / _FILE, json_text(kept | found, indent=1) + "\n")
    earlier = ", ".join(sorted(kept.keys() - found.keys()))
    print(f"written: {out / _FILE}{f' (as they were: {earlier})' if earlier else ''}")
    return found


def _compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """Print the table; returns how many figures got worse."""
    from tools.bench.common import ChangeKind, changes, table

    found = changes(old, new, declared())
    print(table(found))
    for bench in sorted(old.keys() & new.keys()):
        before, after = (facts[bench].get("machine", {}) for facts in (old, new))
        if before != after:
            print(f"{bench}: measured on other machines or versions: {before} and {after}")
    return sum(change.kind is ChangeKind.WORSE for change in found)


def declared() -> dict[str, Declared]:
    """Return the figures declared by each bench."""
    from tools.bench.checkpoint import checkpoint_figures
    from tools.bench.codec import codec_figures
    from tools.bench.data import data_figures
    from tools.bench.step import step_figures
    from tools.bench.t2v import t2v_figures

    return {
        SpeedBench.CHECKPOINT.value: checkpoint_figures,
        SpeedBench.CODEC.value: codec_figures,
        SpeedBench.DATA.value: data_figures,
        SpeedBench.STEP.value: step_figures,
        SpeedBench.T2V.value: t2v_figures,
    }


def _read(path: Path) -> dict[str, Any]:
    """A record of all benches.

    Raises:
        DataError: it is none.
    """
    found = _json(path)
    if not isinstance(found, dict) or not found.keys() <= {bench.value for bench in SpeedBench}:
        raise DataError(
            f"{path} is no record of `regen bench all`, which is one JSON object {{bench: facts}}"
            "; give one that it wrote"
        )
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); give a file that `regen bench all` wrote") from error
