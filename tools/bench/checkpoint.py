"""`regen bench checkpoint`: cost of saving and loading checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple
from uuid import uuid4

import typer

from launcher.supervise import launch
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config import load_config, save_config
from regen_dist.data.storage.store import Store
from regen_dist.observe.record import read_record
from regen_dist.programs import python, regen
from regen_dist.tables import Table
from tools import stages
from tools.bench import checkpoint_cases
from tools.bench.checkpoint_cases import Saving, saving
from tools.bench.common import (
    GIVEN_STORE,
    LOCAL_STORE,
    MEASURED,
    Figure,
    config_facts,
    local_store,
    opening_facts,
    require_success,
    split_arguments,
    spread,
    spread_text,
    write_record,
)
from tools.shards.progress import stopping_cleanly

_CLIPS = 32

_CONFIG = Path("configs/bench/checkpoint.yaml")


def checkpoint(
    config: Annotated[Path, typer.Argument(help="What is trained.", metavar="[CONFIG]")] = _CONFIG,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Folder in a bucket to save to, too; a SeaweedFS on this machine by default.")
    ] = None,
    bucket: Annotated[bool, typer.Option("--bucket/--no-bucket", help="Whether to measure a bucket.")] = True,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the table; its disk is measured.")] = Path(
        "runs/bench/checkpoint"
    ),
    ranks: Annotated[int, typer.Option(help="Processes that train, save and load.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="How often all of it is done, by new processes.", min=1)] = 2,
    repeats: Annotated[int, typer.Option(help="Turns of saving and loading in each round.", min=1)] = 2,
) -> None:
    """Measure checkpoints: what a save blocks and costs a real run, its bytes, saving and loading beside plain files,
    torch.distributed.checkpoint and DeepSpeed. Takes four minutes on two cores; leaves its figures alone.

    Example: regen bench checkpoint --no-bucket
    """
    from rich.console import Console

    from regen_dist.config import load_embedder_config
    from regen_dist.config.identity import clips_per_rank
    from regen_dist.data.synthetic.dataset import build_synthetic
    from regen_dist.data.synthetic.shapes import SyntheticOptions

    console = Console(stderr=True)
    config, asked = split_arguments(config, overrides or [], _CONFIG)
    own = [*asked, "train.log_every=1", "data.validation_url=null", "checkpoint.url=null"]
    base = load_embedder_config(config, own)
    clips_per_rank(base, ranks)
    if bucket and url is not None:
        Store(url).size("regen-bench")  # what refuses is found now, not after the trainings
    facts = opening_facts() | config_facts(config, own, base)
    facts |= {"ranks": ranks, "rounds": rounds, "repeats": repeats, "reads": "warm page cache"}
    out.mkdir(parents=True, exist_ok=True)
    with stopping_cleanly(continues=False), TemporaryDirectory(dir=out, prefix=".work-") as work:
        bench = CheckpointBench(config, tuple(own), ranks, repeats, Path(work), console.print)
        build_synthetic(
            bench.clips, SyntheticOptions(number=_CLIPS, seed=0, frames=2 * base.model.num_frames, samples_per_shard=16)
        )
        found = []
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds}")
            found.append(bench.round(number, url, bucket=bucket))
    facts |= sections(found)
    write_record(out, "checkpoint", facts, table(facts))


# Figures of `regen bench checkpoint` from the measurements, and their Markdown table.
#
# Everything is in seconds, so a ratio is a relative duration; ratios are formed within a round, and the median is
# reported with minimum and maximum.

BLOCKED_TARGET = 0.05  # of one step, beside one bare copy of the state
STATE_BYTES = 16  # a parameter: master weight, moving average and two moments in float32
_AGAINST = {"save": "plain files", "load": "plain reads"}
_IN_BUCKET = {"save": "bucket: plain objects", "load": "bucket: plain gets"}
_CHOSEN = "ours, from choosing to loaded, "
LACKS = {
    "torch.distributed.checkpoint": "no checksums, so a flipped byte is loaded; files are synced and its metadata is "
    "written last, but nothing says which step to go on from; loads at any number of ranks",
    "DeepSpeed": "without the moving average (12 bytes a parameter); no checksums; files are not synced, and `latest` "
    "is written before all ranks are done; loads at the same number of ranks alone",
}
Turns = list[dict[str, Any]]


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Return median, minimum, maximum and all values."""
    return {**spread(values), "values": list(values)}


def state_section(parameters: int, written_bytes: int, files: int) -> dict[str, Any]:
    """Return the bytes written in relation to the state's size."""
    state = STATE_BYTES * parameters
    return {
        "parameters": parameters,
        "state_bytes": state,
        "written_bytes": written_bytes,
        "files": files,
        "ratio": written_bytes / state,
    }


def training_section(
    asynchronous: Sequence[Saving], synchronous: Sequence[Saving], copies_s: Sequence[float]
) -> dict[str, Any]:
    """Return the cost of saving during a run: one `Saving` and one plain copy of the state per round."""
    rounds = [(run, BLOCKED_TARGET * run.step_s + copy) for run, copy in zip(asynchronous, copies_s, strict=True)]
    beside = [(run, save) for run in asynchronous for save in run.saves if save.beside]
    return {
        "target": f"standing still at most {BLOCKED_TARGET:.0%} of one step and one copy of the state",
        "step_s": figure([value for run in (*asynchronous, *synchronous) for value in run.quiet_s]),
        "copy_s": figure(copies_s),
        "asynchronous": {
            **_save_figures(asynchronous),
            "first_blocked_s": figure([run.first_blocked_s for run in asynchronous]),
            "still_of_step": figure([save.still_s / run.step_s for run, _ in rounds for save in run.saves]),
            "allowed_of_step": figure([most_s / run.step_s for run, most_s in rounds]),
            "still_of_allowed": figure([save.still_s / most_s for run, most_s in rounds for save in run.saves]),
            "steps_beside": figure([save.beside for run in asynchronous for save in run.saves]),
            "step_beside_of_step": figure([save.beside_s / save.beside / run.step_s for run, save in beside] or [1.0]),
        },
        "synchronous": _save_figures(synchronous),
        "asynchronous_of_synchronous": figure(
            [_cost(one) / _cost(other) for one, other in zip(asynchronous, synchronous, strict=True)]
        ),
    }


def _save_figures(runs: Sequence[Saving]) -> dict[str, Any]:
    saves = [(run, save) for run in runs for save in run.saves]
    return {
        **{name: figure([getattr(save, name) for _, save in saves]) for name in ("blocked_s", "still_s", "seconds")},
        "cost_s": figure([run.cost_s(save) for run, save in saves]),
        "cost_of_step": figure([run.cost_s(save) / run.step_s for run, save in saves]),
    }


def _cost(run: Saving) -> float:
    return median(run.cost_s(save) for save in run.saves)


def cases_section(kind: str, cases: Mapping[str, Turns]) -> dict[str, Any]:
    """Return seconds and bytes of each way to save or load, relative to plain files; for a bucket, to its own.

    Args:
        kind: "save" or "load".
        cases: turns of each.
    """
    found: dict[str, Any] = {"against": _AGAINST[kind], "cases": {}, "ratios": {}}
    for name, turns in cases.items():
        extra = {fact: figure([turn["facts"][fact] for turn in turns]) for fact in turns[0]["facts"]}
        seconds = figure([turn["seconds"] for turn in turns])
        found["cases"][name] = {"seconds": seconds, "bytes": median(turn["amount"] for turn in turns), **extra}
        base = _IN_BUCKET[kind] if name.startswith("bucket") else _AGAINST[kind]
        if name != base:
            pairs = zip(turns, cases[base], strict=True)
            found["ratios"][name] = figure([turn["seconds"] / other["seconds"] for turn, other in pairs])
    if kind == "load":
        whole = [cases[f"{_CHOSEN}{how}"] for how in ("checksums verified", "sizes compared")]
        found["checksums_add_s"] = figure([a["seconds"] - b["seconds"] for a, b in zip(*whole, strict=True)])
    return found


def table(facts: Mapping[str, Any]) -> str:
    """Format all figures, and features that the alternatives lack."""
    state = facts["state"]
    size = f"{state['state_bytes'] / 1e6:.0f} MB"
    written = f"bytes written, for a state of {size} ({STATE_BYTES} bytes a parameter)"
    rows = [
        *_training_rows(facts["training"], size),
        [written, f"{state['written_bytes'] / 1e6:.1f} MB", f"{state['ratio']:.4f}", ""],
        *_case_rows("saving", facts["save"], f"{facts['ranks']} ranks"),
    ]
    for ranks, section in facts["load"].items():
        rows += _case_rows("loading", section, f"{ranks} rank(s)")
    lacks = "\n".join(f"- {name}: {text}." for name, text in LACKS.items())
    return Table(MEASURED, rows, note=lacks).to_markdown()


def _training_rows(training: Mapping[str, Any], size: str) -> Iterator[list[str]]:
    ours, waited = training["asynchronous"], training["synchronous"]
    allowed = f"≤ {ours['allowed_of_step']['median']:.1%} of a step ({BLOCKED_TARGET:.0%} and one copy)"
    yield ["one undisturbed training step", _seconds(training["step_s"]), "", ""]
    yield [f"one bare copy of the state, {size}", _seconds(training["copy_s"]), "", ""]
    still = f"{_share(ours['still_of_step'])} of a step"
    yield ["asynchronous save: training stands still", _seconds(ours["still_s"]), still, allowed]
    yield ["… beside what the target allows", "", spread_text(ours["still_of_allowed"]), "≤ 1"]
    beside = f"steps while the thread writes ({ours['steps_beside']['median']:g} a save), beside an undisturbed one"
    yield [beside, "", spread_text(ours["step_beside_of_step"]), ""]
    for name, run in (("asynchronous", ours), ("synchronous", waited)):
        cost = f"{_share(run['cost_of_step'])} of a step"
        yield [f"{name} save: all that it costs the run", _seconds(run["cost_s"]), cost, ""]


def _case_rows(verb: str, section: Mapping[str, Any], who: str) -> Iterator[list[str]]:
    for name, case in section["cases"].items():
        ratio = section["ratios"].get(name)
        sync = f"; syncing then takes {_seconds(case['sync_s'])}" if "sync_s" in case else ""
        figures = f"{_seconds(case['seconds'])}, {case['bytes'] / 1e6:.0f} MB{sync}"
        yield [f"{verb} by {who}: {name}", figures, spread_text(ratio) if ratio else "", ""]
    if "checksums_add_s" in section:
        yield [f"{verb} by {who}: verifying checksums adds", _seconds(section["checksums_add_s"]), "", ""]


def _seconds(found: Mapping[str, float]) -> str:
    return f"{found['median']:.3f} s"


def _share(found: Mapping[str, float]) -> str:
    return f"{found['median']:.1%} ({found['min']:.1%} to {found['max']:.1%})"


def checkpoint_figures(facts: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures by which two records are compared."""
    training = facts["training"]
    yield Figure("a step, s", training["step_s"]["median"], False, noise=0.25)
    for kind in ("asynchronous", "synchronous"):
        yield Figure(f"{kind} save costs, s", training[kind]["cost_s"]["median"], False, noise=0.5)
    sections = {f"saving by {facts['ranks']} ranks": facts["save"]}
    sections |= {f"loading by {ranks} rank(s)": section for ranks, section in facts["load"].items()}
    for verb, section in sections.items():
        for name, ratio in section["ratios"].items():
            if name.startswith(("ours", "bucket: ours")):
                yield Figure(f"{verb}, {name}, beside {section['against']}", ratio["median"], False, noise=0.25)
    yield Figure("bytes written over the state's", facts["state"]["ratio"], False, noise=0.01)


# Rounds of `regen bench checkpoint`: each starts new runs and ranks, one after the other.

_MODES = {"asynchronous": "true", "synchronous": "false"}


class BenchStore(NamedTuple):
    """A folder in a bucket, or None; and what it is."""

    url: str | None
    described: str


class Round(NamedTuple):
    """Results of one round: runs by mode, figures by number of ranks, bytes and files of a checkpoint."""

    runs: dict[str, Saving]
    measured: dict[int, dict[str, Any]]
    written_bytes: int
    files: int
    store: str


@dataclass(frozen=True)
class CheckpointBench:
    """Settings of the checkpoint bench.

    Args:
        config: config file of the run.
        overrides: config overrides.
        ranks: number of ranks that train, save and load.
        repeats: turns of saving and loading per round.
        work: folder of all files, on the disk to be measured.
        log: called with progress messages.
    """

    config: Path
    overrides: Sequence[str]
    ranks: int
    repeats: int
    work: Path
    log: Callable[[str], None]

    @property
    def clips(self) -> Path:
        """Training dataset."""
        return self.work / "clips"

    def round(self, number: int, url: str | None, *, bucket: bool) -> Round:
        """Run everything once: each kind of training, saving and loading by `ranks`, loading by another number of
        ranks."""
        folder = self.work / f"round-{number}"
        runs = {mode: self._train(folder, mode) for mode in _MODES}
        checkpoints = CheckpointFolder(folder / "asynchronous" / "checkpoints")
        manifest = checkpoints.manifest(checkpoints.steps()[-1])
        with place(url, bucket=bucket) as there:
            measured = {self.ranks: self._measure(folder, self.ranks, there)}
            other = 1 if self.ranks > 1 else 2
            measured[other] = self._measure(folder, other, there, "--load")
        shutil.rmtree(folder)  # room for the next
        return Round(runs, measured, manifest.size_bytes, len(manifest.files), there.described)

    def _train(self, folder: Path, mode: str) -> Saving:
        """Train a run from start to end; return the saves in its record."""
        places = [*self._places(folder), f"name={mode}", f"checkpoint.asynchronous={_MODES[mode]}"]
        program = regen("train", str(self.config), *self.overrides, *places, "--ranks", str(self.ranks))
        folder.mkdir(exist_ok=True)
        log = folder / f"{mode}.log"
        require_success(stages.run_program(program, log=log).returncode, f"the run with {mode} saves", log)
        found = saving(read_record(folder / mode / "metrics.jsonl"))
        cost = median(found.cost_s(save) for save in found.saves)
        self.log(f"  {mode} saves: {cost:.3f} s each, of a run whose steps take {found.step_s:.3f} s")
        return found

    def _measure(self, folder: Path, ranks: int, there: BenchStore, *options: str) -> dict[str, Any]:
        """Return the figures of the rank program with this number of ranks."""
        measured = folder / "measured"
        save_config(load_config(self.config, [*self.overrides, *self._places(folder)]), measured)
        program = python("-m", checkpoint_cases.__name__, str(measured), f"--repeats={self.repeats}", *options)
        program += [f"--url={there.url}"] if there.url else []
        code = launch(program, ranks=ranks, logs=measured)
        require_success(code, f"measuring with {ranks} rank(s)", checkpoint_cases.log_file(measured, ranks))
        self.log(f"  saved and loaded by {ranks} rank(s)" if not options else f"  loaded by {ranks} rank(s)")
        return json.loads(checkpoint_cases.result_file(measured, ranks).read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def _places(self, folder: Path) -> list[str]:
        return [f"data.url={self.clips}", f"output={folder}"]


@contextmanager
def place(url: str | None, *, bucket: bool) -> Iterator[BenchStore]:
    """Yield the store of checkpoints beside the disk: a new folder in the bucket `url`, emptied at the end, or a local
    server for the duration of the block."""
    if not bucket:
        yield BenchStore(None, "none")
    elif url is None:
        with local_store() as (address, _):
            yield BenchStore(f"{address}/checkpoints", LOCAL_STORE)
    else:
        address = f"{url.rstrip('/')}/regen-bench-{uuid4().hex[:8]}"
        try:
            yield BenchStore(address, GIVEN_STORE)
        finally:
            store = Store(address)
            for name in store.list():
                store.delete(name)


def sections(rounds: Sequence[Round]) -> dict[str, Any]:
    """Combine the figures of all rounds."""
    ranks, other = rounds[0].measured
    ours = [each.measured[ranks] for each in rounds]
    copies = [median(turn["seconds"] for turn in each["save"]["bare copy"]) for each in ours]
    asynchronous, synchronous = ([each.runs[mode] for each in rounds] for mode in _MODES)
    return {
        "store": rounds[0].store,
        "state": state_section(ours[0]["parameters"], rounds[0].written_bytes, rounds[0].files),
        "training": training_section(asynchronous, synchronous, copies),
        "save": cases_section("save", _merge_rounds([each["save"] for each in ours])),
        "load": {
            str(number): cases_section("load", _merge_rounds([each.measured[number]["load"] for each in rounds]))
            for number in (ranks, other)
        },
        "restored_alike": all(found["restored_alike"] for each in rounds for found in each.measured.values()),
        "deepspeed_elsewhere": rounds[0].measured[other].get("deepspeed_says", ""),
    }


def _merge_rounds(rounds: Sequence[dict[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [turn for each in rounds for turn in each[name]] for name in rounds[0]}
