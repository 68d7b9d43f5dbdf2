"""The parts of `regen bench step`: what is trained, in this process or by ranks that it starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from launcher.local import launch
from regen_dist.config import AnyRunConfig, RunConfig, config_hash, load_config, load_embedder_config
from regen_dist.config.loading import t2v_only
from regen_dist.data.making.moving_shapes import SyntheticOptions
from regen_dist.data.making.synthetic import build_synthetic
from regen_dist.distributed.base import precision_of
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import EXIT_OK, EXIT_RESUME, TrainingError
from regen_dist.evaluation.data_speed.turns import in_turn
from regen_dist.evaluation.step_speed import ranks as found_by_ranks
from regen_dist.evaluation.step_speed.profiling import profiled
from regen_dist.evaluation.step_speed.utilisation import matrix_peak, section, steps_case
from regen_dist.evaluation.t2v_speed.prepare import prepare
from regen_dist.programs import python
from tools import stages
from tools.bench import step_rank
from tools.bench.step_rank import Training

EMBEDDER, T2V, SHARDED = "embedder", "text to video", "text to video, to be sharded"
CHECKPOINTED, COMPILED = "activations recomputed", "torch.compile"
ONE, TWO = "one process", "ZeRO-3, two ranks"
HERE, THERE = "this checkout", "the other checkout"
_CHECKPOINTING = "engine.activation_checkpointing=true"
_VIDEOS = 16
_RANK = Path(step_rank.__file__).resolve()


class Run(NamedTuple):
    """What is trained: a file, what is changed in it, and the config that they give."""

    path: Path
    overrides: list[str]
    config: AnyRunConfig

    @classmethod
    def of(cls, path: Path, overrides: Sequence[str]) -> Run:
        return cls(path, list(overrides), load_config(path, overrides))

    def with_changes(self, *overrides: str) -> Run:
        """The same run with more changes."""
        return Run.of(self.path, [*self.overrides, *overrides])

    def facts(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"config": str(self.path), "overrides": self.overrides, "config_hash": config_hash(self.config)}


def prepared(paths: Mapping[str, Path], work: Path, side: int) -> dict[str, Run]:
    """The runs on data that is made here: moving shapes for the embedder, and their cache for text to video."""
    common = [f"engine.precision={stages.working_precision()}", "engine.kind=plain", f"output={work / 'runs'}"]
    common += ["data.image_fraction=0", "data.validation_url=null"]
    t2v_own = [*common, "generation.embedder=null", f"data.url={work / 'cached' / 'latents'}"]
    runs = {EMBEDDER: Run.of(paths[EMBEDDER], [*common, f"data.url={work / 'clips'}"])}
    runs |= {name: Run.of(path, t2v_own) for name, path in paths.items() if name != EMBEDDER}
    embedder = load_embedder_config(paths[EMBEDDER], runs[EMBEDDER].overrides)
    _make_clips(embedder, work / "clips")
    if len(runs) > 1:
        _make_cache([runs[name] for name in runs if name != EMBEDDER], embedder, work / "cached", side)
    return runs


def _make_clips(config: RunConfig, folder: Path) -> None:
    frames, side = 2 * config.model.num_frames, max(map(max, config.data.sizes))
    options = SyntheticOptions(_VIDEOS, seed=0, side=side, frames=frames, samples_per_shard=_VIDEOS)
    build_synthetic(folder, options, workers=0)


def _make_cache(runs: Sequence[Run], embedder: RunConfig, work: Path, side: int) -> None:
    configs = [t2v_only(run.config, str(run.path)) for run in runs]
    latent = embedder.model.latent.model_copy(update={"channels": configs[0].model.latent_channels})
    maker = embedder.model_copy(update={"model": embedder.model.model_copy(update={"latent": latent})})
    clips = max(max(config.data.clips) for config in configs)
    work.mkdir()
    prepare(work, maker, videos=_VIDEOS, side=side, clips=clips, text_width=configs[0].model.text_width)


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Args:
        runs: that are trained, by name.
        work: a folder for what the ranks leave.
        steps: of one turn.
        repeats: turns of each.
        say: told what is done.
    """

    runs: Mapping[str, Run]
    work: Path
    steps: int
    repeats: int
    say: Callable[[str], None]

    def utilisation(self, *, compiled: bool) -> dict[str, Any]:
        """The model's operations beside bare products, and the profile, of the embedder and of text to video; in turn
        with them the same with recomputed activations, and compiled if asked for."""
        variants: dict[str, tuple[Run, bool]] = {}
        for name in (EMBEDDER, T2V):
            variants[name] = (self.runs[name], False)
            variants[f"{name}, {CHECKPOINTED}"] = (self.runs[name].with_changes(_CHECKPOINTING), False)
            if compiled:
                variants[f"{name}, {COMPILED}"] = (self.runs[name], True)
        with ExitStack() as stack:
            trained = {name: stack.enter_context(closing(_training(*each))) for name, each in variants.items()}
            return self._measured(trained)

    def _measured(self, trained: Mapping[str, Training]) -> dict[str, Any]:
        peak = matrix_peak(torch.device("cpu"), precision_of(self.runs[EMBEDDER].config.engine.precision))
        for name, training in trained.items():
            self.say(f"  {name}: {training.parameters / 1e6:.1f} million parameters")
            training.step()
            training.step()  # what the allocator and the kernels learn from the first
        cases = {name: steps_case(each.step, each.flops, peak, self.steps) for name, each in trained.items()}
        rounds = in_turn(cases, self.repeats, lambda name, turn: self.say(f"  {name}: {_mfu(turn):.2f} of the peak"))
        against = {name: name.rpartition(", ")[0] for name in trained if ", " in name}
        figures = section(rounds, threads=torch.get_num_threads(), against=against)
        for name, training in trained.items():
            figures["cases"][name] |= {"parameters": training.parameters, "sample": training.sample}
        figures["profile"] = {name: profiled(trained[name].step, self.steps) for name in (EMBEDDER, T2V)}
        return figures

    def memory(self) -> dict[str, Any]:
        """The memory of one process beside its estimate, with activations kept and recomputed."""
        found = {}
        for name in (EMBEDDER, T2V):
            for kind, changes in (("activations kept", []), (CHECKPOINTED, [_CHECKPOINTING])):
                run = self.runs[name].with_changes(*changes)
                found[f"{name}, {kind}"] = self._memory(f"{name}, {kind}", self._job(run, 1), run)
        return found

    def sharding(self) -> dict[str, Any]:
        """The same global batch by one process and by two ranks, in turn, and the memory of both."""
        runs = {ONE: self.runs[SHARDED], TWO: self.runs[SHARDED].with_changes("engine.kind=zero3")}
        jobs: dict[str, list[found_by_ranks.Job]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                jobs[name].append(self._job(run, 1 if name == ONE else 2))
                self.say(f"  {name}: {found_by_ranks.cpu_s(jobs[name][-1]):.2f} s of CPU time a step")
        memory = {name: self._memory(name, each[-1], runs[name]) for name, each in jobs.items()}
        target = {"target": found_by_ranks.CPU_TARGET}
        return {**found_by_ranks.compared(jobs, ONE), **target, "memory": memory, **self.runs[SHARDED].facts()}

    def against(self, checkout: Path) -> dict[str, Any]:
        """The step of another checkout of this repository, in turn with this one's, each by its own program."""
        places = {THERE: checkout.resolve(), HERE: None}
        found = {}
        for name in (EMBEDDER, T2V):
            jobs: dict[str, list[found_by_ranks.Job]] = {place: [] for place in places}
            for _ in range(self.repeats):
                for place, tree in places.items():
                    jobs[place].append(self._job(self.runs[name], 1, tree))
                    self.say(f"  {name}, {place}: {found_by_ranks.cpu_s(jobs[place][-1]):.3f} s of CPU time a step")
            found[name] = found_by_ranks.compared(jobs, THERE) | {"losses": _losses(jobs)}
        return found

    def _memory(self, name: str, job: found_by_ranks.Job, run: Run) -> dict[str, Any]:
        """Of ranks that were timed, and of as many more whose tensors are counted."""
        figures = found_by_ranks.memory(job, self._job(run, len(job), options=["--tensors"]), run.config)
        self.say(f"  memory, {name}: {figures['tensor_bytes'] / 1e6:.0f} MB, {figures['ratio']:.2f} of the estimate")
        return figures

    def _job(
        self, run: Run, ranks: int, checkout: Path | None = None, options: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """What each rank of a start of its own found, on one thread a rank; by another checkout's program if given."""
        rank = _RANK if checkout is None else checkout / "tools" / "bench" / _RANK.name
        if not rank.is_file():
            raise TrainingError(f"{checkout} has no {rank.relative_to(rank.parents[2])}; give a checkout that has it")
        program = python(str(rank), str(run.path.resolve()), *run.overrides)
        program += ["--out", str(self.work), "--steps", str(self.steps), *options]
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        if checkout is not None:
            own["PYTHONPATH"] = str(checkout)
        code = launch(program, ranks=ranks, logs=self.work, environment=own)
        if code == EXIT_RESUME:
            raise KeyboardInterrupt  # it was asked to stop, and this command with it
        if code != EXIT_OK:
            raise TrainingError(f"measuring {run.path} with {ranks} rank(s) ended with exit code {code}")
        files = [step_rank.result_file(self.work, rank) for rank in range(ranks)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _training(run: Run, compiled: bool) -> Training:
    return Training(run.config, Ranks(), compiled=compiled)


def _mfu(turn: Any) -> float:
    return float(turn.rate / turn.facts["peak"])


def _losses(jobs: Mapping[str, Sequence[found_by_ranks.Job]]) -> dict[str, float]:
    """After the last step: equal where a change of the code did not change what is computed."""
    return {place: each[-1][0]["loss"] for place, each in jobs.items()}
