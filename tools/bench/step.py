"""`regen bench step`: cost of a training step relative to the machine's peak."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import typer

from launcher.supervise import launch
from regen_dist.config import AnyRunConfig, EmbedderConfig, load_config, load_embedder_config
from regen_dist.config.files import t2v_only
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.distributed.engine import precision_of
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import ConfigError
from regen_dist.programs import python
from regen_dist.tables import Table, numbers
from tools import stages
from tools.bench import step_rank
from tools.bench.common import (
    MEASURED,
    Figure,
    config_facts,
    in_turn,
    opening_facts,
    require_success,
    spread_text,
    write_record,
)
from tools.bench.step_rank import MEMORY_TARGET, Job, Training, matrix_peak, profiled, quiet, section, steps_case
from tools.bench.t2v import prepare
from tools.shards.progress import stopping_cleanly


class StepPart(StrEnum):
    """Parts that can be measured."""

    UTILISATION = "utilisation"
    MEMORY = "memory"
    SHARDING = "sharding"


def step(
    embedder: Annotated[Path, typer.Option(help="Config of the embedder.")] = Path("configs/bench/step_embedder.yaml"),
    t2v: Annotated[Path, typer.Option(help="Config of the text-to-video model.")] = Path("configs/bench/step_t2v.yaml"),
    sharded: Annotated[Path, typer.Option(help="Config of text to video that two ranks share.")] = Path(
        "configs/bench/step_sharded.yaml"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the table.")] = Path("runs/bench/step"),
    side: Annotated[int, typer.Option(help="Of text to video's videos, in pixels: a multiple of 16.", min=32)] = 128,
    steps: Annotated[int, typer.Option(help="Steps of one turn.", min=1)] = 3,
    repeats: Annotated[int, typer.Option(help="Turns of each.", min=1)] = 5,
    only: Annotated[list[StepPart] | None, typer.Option(help="Measure this alone; may be given again.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="The steps through torch.compile, too.")] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="Another checkout of this repository: measure its steps beside these, and nothing else."),
    ] = None,
) -> None:
    """Measure a training step: the model's operations per second beside bare matrix products, a profile, the price of
    recomputing activations and of ZeRO-3, memory beside its estimate. Takes fifteen minutes on two cores.

    Example: regen bench step --only utilisation --compile
    """
    from rich.console import Console

    program = None if against is None else _rank_of(against)
    console, parts = Console(stderr=True), only or ([] if against else list(StepPart))
    facts = opening_facts() | {"precision": stages.working_precision(), "steps": steps, "repeats": repeats}
    out.mkdir(parents=True, exist_ok=True)
    quiet(torch.device("cpu"))
    with stopping_cleanly(continues=False), TemporaryDirectory(dir=out, prefix=".work-") as folder:
        runs = prepared({EMBEDDER: embedder, T2V: t2v, SHARDED: sharded}, Path(folder), side)
        bench = StepBench(runs, Path(folder), steps, repeats, console.print)
        facts["runs"] = {name: run.facts() for name, run in runs.items()}
        for part in parts:
            console.print(f"measuring {part}")
            options = {"compiled": compiled} if part is StepPart.UTILISATION else {}
            facts[part.value] = getattr(bench, part.value)(**options)
        if program is not None:
            console.print(f"measuring beside {against}")
            facts["against"] = bench.against(program)
    write_record(out, "step", facts, table(facts))


def _rank_of(checkout: Path) -> Path:
    """Return the rank program of another checkout.

    Raises:
        ConfigError: it has none.
    """
    program = checkout.resolve() / _RANK.relative_to(_RANK.parents[2])
    if not program.is_file():
        raise ConfigError(f"--against {checkout}: {program} does not exist; give a checkout of this repository")
    return program


# Parts of `regen bench step`: trainings, in this process or on ranks that it starts.

EMBEDDER, T2V, SHARDED = "embedder", "text to video", "text to video, to be sharded"
CHECKPOINTED, COMPILED = "activations recomputed", "torch.compile"
ONE, TWO = "one process", "ZeRO-3, two ranks"
HERE, THERE = "this checkout", "the other checkout"
_CHECKPOINTING = "engine.activation_checkpointing=true"
_VIDEOS = 16
_RANK = Path(step_rank.__file__).resolve()


class BenchRun(NamedTuple):
    """A run to measure: config file, overrides, and the resulting config."""

    path: Path
    overrides: list[str]
    config: AnyRunConfig

    @classmethod
    def of(cls, path: Path, overrides: Sequence[str]) -> BenchRun:
        return cls(path, list(overrides), load_config(path, overrides))

    def with_changes(self, *overrides: str) -> BenchRun:
        """Return the same run with further overrides."""
        return BenchRun.of(self.path, [*self.overrides, *overrides])

    def facts(self) -> dict[str, Any]:
        """Return its description for the record."""
        return config_facts(self.path, self.overrides, self.config)


def prepared(paths: Mapping[str, Path], work: Path, side: int) -> dict[str, BenchRun]:
    """Return runs on generated data: moving shapes for the embedder, and their cache for text to video."""
    common = [f"engine.precision={stages.working_precision()}", "engine.kind=plain", f"output={work / 'runs'}"]
    common += ["data.image_fraction=0", "data.validation_url=null"]
    t2v_own = [*common, "generation.embedder=null", f"data.url={work / 'cached' / 'latents'}"]
    runs = {EMBEDDER: BenchRun.of(paths[EMBEDDER], [*common, f"data.url={work / 'clips'}"])}
    runs |= {name: BenchRun.of(path, t2v_own) for name, path in paths.items() if name != EMBEDDER}
    embedder = load_embedder_config(paths[EMBEDDER], runs[EMBEDDER].overrides)
    frames, side_px = 2 * embedder.model.num_frames, max(map(max, embedder.data.sizes))
    options = SyntheticOptions(_VIDEOS, seed=0, side=side_px, frames=frames, samples_per_shard=_VIDEOS)
    build_synthetic(work / "clips", options, workers=0)
    if len(runs) > 1:
        _make_cache([runs[name] for name in runs if name != EMBEDDER], embedder, work / "cached", side)
    return runs


def _make_cache(runs: Sequence[BenchRun], embedder: EmbedderConfig, work: Path, side: int) -> None:
    configs = [t2v_only(run.config, str(run.path)) for run in runs]
    latent = embedder.model.latent.model_copy(update={"channels": configs[0].model.latent_channels})
    maker = embedder.model_copy(update={"model": embedder.model.model_copy(update={"latent": latent})})
    clips = max(max(config.data.clips) for config in configs)
    work.mkdir()
    prepare(work, maker, videos=_VIDEOS, side=side, clips=clips, text_width=configs[0].model.text_width)


@dataclass(frozen=True)
class StepBench:
    """Settings of the step bench.

    Args:
        runs: runs to train, by name.
        work: folder of the ranks' output.
        steps: steps per turn.
        repeats: turns of each.
        log: called with progress messages.
    """

    runs: Mapping[str, BenchRun]
    work: Path
    steps: int
    repeats: int
    log: Callable[[str], None]

    def utilisation(self, *, compiled: bool) -> dict[str, Any]:
        """Measure model FLOPs against plain matrix products, with a profile, for embedder and text to video; in turn
        also with activation checkpointing, and compiled if requested."""
        variants: dict[str, tuple[BenchRun, bool]] = {}
        for name in (EMBEDDER, T2V):
            variants[name] = (self.runs[name], False)
            variants[f"{name}, {CHECKPOINTED}"] = (self.runs[name].with_changes(_CHECKPOINTING), False)
            if compiled:
                variants[f"{name}, {COMPILED}"] = (self.runs[name], True)
        with ExitStack() as stack:
            trained = {
                name: stack.enter_context(closing(Training(run.config, Ranks(), compiled=through)))
                for name, (run, through) in variants.items()
            }
            return self._measured(trained)

    def _measured(self, trained: Mapping[str, Training]) -> dict[str, Any]:
        peak = matrix_peak(torch.device("cpu"), precision_of(self.runs[EMBEDDER].config.engine.precision))
        for name, training in trained.items():
            self.log(f"  {name}: {training.parameters / 1e6:.1f} million parameters")
            training.step()
            training.step()  # what the allocator and the kernels learn from the first
        cases = {name: steps_case(each.step, each.flops, peak, self.steps) for name, each in trained.items()}
        rounds = in_turn(
            cases,
            self.repeats,
            lambda name, turn: self.log(f"  {name}: {turn.rate / turn.facts['peak']:.2f} of the peak"),
        )
        against = {name: name.rpartition(", ")[0] for name in trained if ", " in name}
        figures = section(rounds, threads=torch.get_num_threads(), against=against)
        for name, training in trained.items():
            figures["cases"][name] |= {"parameters": training.parameters, "sample": training.sample}
        figures["profile"] = {name: profiled(trained[name].step, self.steps) for name in (EMBEDDER, T2V)}
        return figures

    def memory(self) -> dict[str, Any]:
        """Measure the memory of one process against its estimate, with and without activation checkpointing."""
        found = {}
        for name in (EMBEDDER, T2V):
            for kind, changes in (("activations kept", []), (CHECKPOINTED, [_CHECKPOINTING])):
                run = self.runs[name].with_changes(*changes)
                found[f"{name}, {kind}"] = self._memory(f"{name}, {kind}", self._job(run, 1), run)
        return found

    def sharding(self) -> dict[str, Any]:
        """Measure the same global batch on one process and on two ranks in turn, and the memory of both."""
        runs = {ONE: self.runs[SHARDED], TWO: self.runs[SHARDED].with_changes("engine.kind=zero3")}
        jobs: dict[str, list[Job]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                jobs[name].append(self._job(run, 1 if name == ONE else 2))
                self.log(f"  {name}: {step_rank.cpu_s(jobs[name][-1]):.2f} s of CPU time a step")
        memory = {name: self._memory(name, each[-1], runs[name]) for name, each in jobs.items()}
        facts = {**step_rank.compared(jobs, ONE), "target": step_rank.CPU_TARGET, "memory": memory}
        return facts | self.runs[SHARDED].facts()

    def against(self, program: Path) -> dict[str, Any]:
        """Measure the step of another checkout of this repository in turn with this one's, each by its own program."""
        places = {THERE: program, HERE: _RANK}
        found = {}
        for name in (EMBEDDER, T2V):
            jobs: dict[str, list[Job]] = {place: [] for place in places}
            for _ in range(self.repeats):
                for place, rank in places.items():
                    jobs[place].append(self._job(self.runs[name], 1, rank))
                    self.log(f"  {name}, {place}: {step_rank.cpu_s(jobs[place][-1]):.3f} s of CPU time a step")
            losses = {place: each[-1][0]["loss"] for place, each in jobs.items()}  # equal where the code computes alike
            found[name] = step_rank.compared(jobs, THERE) | {"losses": losses}
        return found

    def _memory(self, name: str, job: Job, run: BenchRun) -> dict[str, Any]:
        """Return the memory of ranks that were timed, and of as many others whose tensors are counted."""
        figures = step_rank.memory(job, self._job(run, len(job), options=["--tensors"]), run.config)
        self.log(f"  memory, {name}: {figures['tensor_bytes'] / 1e6:.0f} MB, {figures['ratio']:.2f} of the estimate")
        return figures

    def _job(self, run: BenchRun, ranks: int, rank: Path = _RANK, options: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return the results of each rank of a new start, with one thread per rank, by this checkout's program or
        another's, with its library."""
        program = python(str(rank), str(run.path.resolve()), *run.overrides)
        program += ["--out", str(self.work), "--steps", str(self.steps), *options]
        own = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(rank.parents[2])} if rank != _RANK else {})
        code = launch(program, ranks=ranks, logs=self.work, environment=own)
        require_success(code, f"measuring {run.path} with {ranks} rank(s)")
        files = [step_rank.result_file(self.work, rank) for rank in range(ranks)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


# Figures of `regen bench step`: Markdown tables, and those that are compared between records.

_NAMES = {"bf16": "bf16", "fp32": "float32"}
Row = tuple[str, str, str, str]


def table(facts: Mapping[str, Any]) -> str:
    """Format the measured parts; omitted parts are missing."""
    rows = [*_utilisation(facts), *_memory(facts.get("memory", {})), *_sharding(facts), *_against(facts)]
    text = Table(MEASURED, rows).to_markdown()
    if profiles := facts.get("utilisation", {}).get("profile"):
        groups = next(iter(profiles.values()))["groups"]
        shares = [(group, *(f"{each['groups'][group]:.1%}" for each in profiles.values())) for group in groups]
        text += "\n" + Table(["share of a step", *numbers(*profiles)], shares).to_markdown()
    return text


def _utilisation(facts: Mapping[str, Any]) -> Iterator[Row]:
    found = facts.get("utilisation", {"cases": {}, "time_ratios": {}})
    for name, case in found["cases"].items():
        peak = f"{case['peak_tflops']['median'] * 1e3:.0f} GFLOP/s"
        threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
        beside = f"{_NAMES[facts['precision']]} matrix products on {threads}, {peak}"
        target = f"≥ {found['target']:g}" * (name not in found["time_ratios"])
        figure = f"{case['step_s']['median']:.2f} s a step of {case['flops_per_step'] / 1e9:.0f} GFLOP"
        yield f"{name}: the model's operations over {beside}", figure, spread_text(case["mfu"]), target
        yield f"{name}: the same by CPU time", "", spread_text(case["mfu_by_cpu"]), ""
    for name, ratio in found["time_ratios"].items():
        yield f"{name}: CPU time of a step, beside without", "", spread_text(ratio), ""


def _memory(found: Mapping[str, Any]) -> Iterator[Row]:
    target = f"{1 - MEMORY_TARGET:g} to {1 + MEMORY_TARGET:g}"
    for name, case in found.items():
        held, resident = (f"{case[f'{kind}_bytes'] / 1e6:.0f} MB" for kind in ("tensor", "resident"))
        yield f"{name}: peak of tensors, beside the estimate of `regen describe`", held, f"{case['ratio']:.2f}", target
        yield f"{name}: peak resident, beside what is written to", resident, f"{case['resident_ratio']:.2f}", ""


def _sharding(facts: Mapping[str, Any]) -> Iterator[Row]:
    found = facts.get("sharding")
    if found is None:
        return
    size = f"{found['parameters'] / 1e6:.0f} million parameters"
    for name, case in found["cases"].items():
        ratio = found["cpu_ratios"].get(name)
        figure = f"{case['cpu_s']['median']:.2f} s"
        target = f"≤ {found['target']:g}" if ratio else ""
        yield f"{name}, {size}: CPU time of a step", figure, spread_text(ratio) if ratio else "", target
    yield from _memory(found["memory"])


def _against(facts: Mapping[str, Any]) -> Iterator[Row]:
    for run, found in facts.get("against", {}).items():
        for name, ratio in found["cpu_ratios"].items():
            own, other = (found["cases"][place] for place in (name, found["against"]))
            beside = f"{name} beside {found['against']}"
            yield f"{run}: CPU time of a step, {beside}", f"{own['cpu_s']['median']:.3f} s", spread_text(ratio), ""
            less = f"{own['peak_bytes'] / other['peak_bytes']:.2f}"
            yield f"{run}: peak memory, {beside}", f"{own['peak_bytes'] / 1e6:.0f} MB", less, ""


def step_figures(facts: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures by which two records are compared. CPU time varies less than wall time."""
    found = facts.get("utilisation", {"cases": {}, "time_ratios": {}})
    for name, case in found["cases"].items():
        yield Figure(f"{name}, of the peak, by CPU time", case["mfu_by_cpu"]["median"], True)
        yield Figure(f"{name}, step, s", case["step_s"]["median"], False, noise=0.25)
    memory = {**facts.get("memory", {}), **facts.get("sharding", {"memory": {}})["memory"]}
    for name, case in memory.items():
        yield Figure(f"{name}, peak of tensors, bytes", case["tensor_bytes"], False, noise=0.01)
        yield Figure(f"{name}, peak resident bytes", case["resident_bytes"], False, noise=0.05)
    for name, ratio in facts.get("sharding", {}).get("cpu_ratios", {}).items():
        yield Figure(f"{name}, CPU time beside one process", ratio["median"], False)
