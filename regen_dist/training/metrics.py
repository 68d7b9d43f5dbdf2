"""Metrics of a range of steps: speed, data wait, MFU, and the means of the losses over micro-batches and ranks."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from regen_dist.checkpoint.saver import Outcome
from regen_dist.config.files import write_text_atomically
from regen_dist.config.run import CommonConfig, OptimizerConfig
from regen_dist.data.loading.plan import BadSample
from regen_dist.distributed.engine import StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import DataError
from regen_dist.evaluation.sheet import sheet_frames, write_sheet
from regen_dist.inference.frames import write_video
from regen_dist.observe.hardware import accelerator, memory_bytes, summarise_machine
from regen_dist.observe.record import Record, read_record
from regen_dist.observe.terminal import ProgressLine, warn
from regen_dist.observe.tracker import Trackers
from regen_dist.pixels import to_frames
from regen_dist.training.task import Batch, Validation


class StepMeter:
    """Gathers the figures of the steps between two log lines.

    Args:
        clips_per_step: clips of the global batch.
        peak_tflops: peak of one rank.
    """

    def __init__(self, ranks: Ranks, clips_per_step: int, peak_tflops: float) -> None:
        self._ranks, self._clips = ranks, clips_per_step
        self._peak = peak_tflops * 1e12 * ranks.world_size
        self._sums: dict[str, Tensor | float] = {}
        self.reset()

    def reset(self) -> None:
        """Clear all counts and restart the clock."""
        self._began, self._steps, self._waited = time.perf_counter(), 0, 0.0
        self._cpu_began = time.process_time()
        self._sums = {}
        self._counts: dict[str, int] = {}  # batches of one step have the same figures on all ranks, steps may differ
        self._flops, self._bad_samples = 0.0, 0
        self._step_losses: list[Tensor] = []
        self._step_bad = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the block as data wait."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, loss: Tensor, figures: Mapping[str, Tensor], flops: float, bad_samples: int = 0) -> None:
        """Add the loss and the figures of a micro-batch of this rank. Kept on the device: no synchronisation.

        Args:
            flops: operations that training on it needs (forward and backward), without recomputation.
            bad_samples: number of replacement samples among its clips.
        """
        for name, value in {"loss": loss.detach(), **figures}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._flops += flops
        self._step_losses.append(loss.detach().double())
        self._step_bad += bad_samples

    def end_step(self) -> tuple[float, int]:
        """Close a step. Returns this rank's mean loss of it, and its number of replacement samples."""
        loss, bad = float(torch.stack(self._step_losses).mean()), self._step_bad
        self._step_losses, self._step_bad = [], 0
        self._steps, self._bad_samples = self._steps + 1, self._bad_samples + bad
        return loss, bad

    def read(self, lr: float, result: StepResult) -> dict[str, float]:
        """The figures since the last reading, averaged over ranks. A collective."""
        names = list(self._sums)
        values = [float(torch.as_tensor(self._sums[name])) for name in names]
        *totals, bad_samples, flops = self._ranks.sum([*values, float(self._bad_samples), self._flops])
        means = {
            name: total / (self._counts[name] * self._ranks.world_size)
            for name, total in zip(names, totals, strict=True)
        }
        elapsed = time.perf_counter() - self._began
        figures = {
            **means,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "step_s": elapsed / self._steps,
            "cpu_step_s": (time.process_time() - self._cpu_began) / self._steps,  # of rank 0, all its threads
            "clips_per_s": self._clips * self._steps / elapsed,
            "mfu": flops / elapsed / self._peak,
            "data_wait": self._waited / elapsed,
            "memory_bytes": memory_bytes(self._ranks.device),
            "bad_samples": bad_samples,
            "clips": self._clips * self._steps,
        }
        self.reset()
        return figures

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out: validation and saving are not training."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self._began += time.perf_counter() - start
        self._cpu_began += time.process_time() - cpu_start


# Slow ranks: the time that each rank waits for data, computes, and takes for a step.
#
# Ranks wait for each other in every step, so the time of a step is nearly the same on all of them. Waiting for data
# and the processor's time are a rank's own, and name the one that the others wait for.

_NAMED = 3
_QUANTITIES = {"data_wait_s": "data wait", "step_s": "step", "cpu_s": "CPU time"}


class RankTimes(NamedTuple):
    """Seconds a step of one rank, on average, and where it is."""

    rank: int
    host: str
    data_wait_s: float
    step_s: float
    cpu_s: float  # of all threads of its process


class RankReport(NamedTuple):
    """Least, median and most over the ranks by name, and the same in words with the slowest ranks."""

    figures: dict[str, float]
    text: str


class RankClock:
    """Times the steps of this rank, from the first on.

    Args:
        ranks: this process's place.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._host = ranks, socket.gethostname()
        self._clear()

    def _clear(self) -> None:
        self._steps, self._waited, self._stepped, self._computed = 0, 0.0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the block as a step, which ends where the ranks agree to go on."""
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self._stepped += time.perf_counter() - start
        self._computed += time.process_time() - cpu
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the block, inside a step, as data wait."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def report(self) -> RankReport:
        """All ranks' steps since the last report. A collective."""
        steps = max(1, self._steps)
        own = (self._waited / steps, self._stepped / steps, self._computed / steps)
        times = self._ranks.gather(RankTimes(self._ranks.rank, self._host, *own))
        self._clear()
        return compared(times)


def compared(times: list[RankTimes]) -> RankReport:
    """The times of all ranks, in numbers and in words."""
    figures: dict[str, float] = {}
    lines = []
    for name, words in _QUANTITIES.items():
        values = [getattr(each, name) for each in times]
        least, middle, most = min(values), median(values), max(values)
        figures |= {f"ranks/{name}_min": least, f"ranks/{name}_median": middle, f"ranks/{name}_max": most}
        worst = sorted(times, key=lambda each: -getattr(each, name))[:_NAMED]
        named = ", ".join(f"rank {each.rank} on {each.host} {getattr(each, name):.3f}" for each in worst)
        lines.append(f"{words} {least:.3f} / {middle:.3f} / {most:.3f} s (most: {named})")
    return RankReport(figures, f"ranks, min / median / max a step: {'; '.join(lines)}")


# Destinations of a run's figures and pictures: the record, the progress line, trackers, picture files. Only rank 0
# reports.


class Reporter:
    """Reports on rank 0; silent elsewhere."""

    def __init__(self, config: CommonConfig, ranks: Ranks, step: int) -> None:
        self._silent, self._run = not ranks.is_main, config.folder
        if self._silent:
            return
        # A run that begins anew validates before its first step again (`train.validate_at_start`).
        self._record = Record(self._run / "metrics.jsonl", step or -1)
        self._line = ProgressLine(config.train.steps, step)
        self._trackers = Trackers(config, self._run, step)
        self._unseen = False
        self._line.message(
            f"{self._run}: {'resumed at' if step else 'starting at'} step {step} on {ranks.world_size} rank(s)"
        )
        machine = accelerator(ranks.device)
        self._line.message(f"rank 0 on {summarise_machine(machine)}")
        self._record.write("event", step, {"event": "start", "world_size": ranks.world_size, "machine": machine})

    def train(self, step: int, figures: Mapping[str, float]) -> None:
        """Report the figures of the steps since the last log line."""
        if self._silent:
            return
        self._record.write("train", step, figures)
        self._line.train(step, figures)
        self._trackers.log(step, {f"train/{name}": value for name, value in figures.items()})

    def validation(self, step: int, result: Validation, seconds: float) -> None:
        """Report the figures of a validation, which took `seconds`, and its media: the first sample's source beside its
        reconstruction; and videos, if any were generated from captions."""
        if self._silent:
            return
        self._record.write("validation", step, {**result.figures, "seconds": seconds})
        self._line.validation(result.figures)
        figures = {f"validation/{name}": value for name, value in result.figures.items()}
        pictures, videos = (self._media_files(write, step, result) for write in (self._draw, self._write_videos))
        self._trackers.log(step, figures, pictures, videos)

    def has_validation(self, step: int) -> bool:
        """Return whether the record has a validation of a step; true where it cannot be read."""
        try:
            lines = read_record(self._run / "metrics.jsonl", "validation")
        except OSError:
            return True
        return any(line["step"] == step for line in lines)

    def _media_files(
        self, write: Callable[[int, Validation], dict[str, Path]], step: int, result: Validation
    ) -> dict[str, Path]:
        """Return the media files; none if the disk refuses, which is reported once and does not end the run."""
        try:
            return write(step, result)
        except (OSError, DataError) as error:  # a video's writer has errors of its own
            if not self._unseen:
                self._unseen = True
                self.event(step, f"warning: no picture or video of step {step}, and the run goes on: {error}")
            return {}

    def gradients(self, step: int, norms: Mapping[str, float]) -> None:
        """Report the norm of every layer's gradient in a step."""
        if self._silent:
            return
        self._record.write("gradients", step, norms)
        self._trackers.log(step, {f"gradients/{layer}": norm for layer, norm in norms.items()})

    def _draw(self, step: int, result: Validation) -> dict[str, Path]:
        if result.source is None or result.made is None:
            return {}
        path = self._run / "pictures" / f"step-{step:08d}.png"
        source, made = (to_frames(video[0]) for video in (result.source, result.made))
        numbers = sheet_frames(min(len(source), len(made)))
        path.parent.mkdir(exist_ok=True)
        generated = bool(result.captions)  # of the same caption, not of the same video: no errors
        write_sheet(
            path, numbers, [source[n] for n in numbers], {result.label: [made[n] for n in numbers]},
            title=f"step {step}: {result.title}", psnr=not generated, errors=not generated,
            source_label=("Validation", "through the embedder") if generated else ("Source", ""),
        )  # fmt: skip
        return {"validation/clip": path}

    def _write_videos(self, step: int, result: Validation) -> dict[str, Path]:
        """Videos that were generated, in `generated/` in the run folder, each named by its number; their captions."""
        if result.made is None or not result.captions:
            return {}
        folder = self._run / "generated" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / "captions.txt", "".join(f"{caption}\n" for caption in result.captions))
        paths = [folder / f"{number:02d}.mp4" for number in range(len(result.captions))]
        for path, video in zip(paths, result.made, strict=True):
            write_video(path, to_frames(video), result.fps)
        return {f"validation/video {number}": path for number, path in enumerate(paths)}

    def event(self, step: int, text: str) -> None:
        """Report an event on the terminal and in the record."""
        if not self._silent:
            self._line.message(text)
            self._record.write("event", step, {"event": text})

    def ranks(self, step: int, report: RankReport) -> None:
        """Report slow ranks: on the terminal, in the record and in the trackers."""
        if not self._silent:
            self.event(step, report.text)
            self._trackers.log(step, report.figures)

    def checkpoint(self, outcome: Outcome) -> None:
        """Report a save that has ended, successfully or not."""
        if self._silent:
            return
        figures = {"seconds": outcome.seconds, "blocked_s": outcome.blocked_s, "bytes": outcome.size_bytes}
        self._record.write("checkpoint", outcome.step, figures | {"problem": outcome.problem or None})

    def rewind(self, step: int) -> None:
        """Drop the records of later steps after the run went back to `step`."""
        if not self._silent:
            self._record.rewind(step)
            self._line.rewind(step)
            self._trackers.rewind(step)

    def close(self) -> None:
        if not self._silent:
            self._line.close()
            self._record.close()
            self._trackers.close()


# Norms of the gradients by layer: a hook of the training step (`train.grad_norms_every`).


class GradientNorms:
    """Reports the norm of every layer's gradient, before clipping: their squares add up to that of `grad_norm`.

    Args:
        every: steps from one report to the next.
        ranks: ranks of the job; each holds a piece of every gradient.
        report: called with the step and the norm of each layer.
    """

    def __init__(self, every: int, ranks: Ranks, report: Callable[[int, Mapping[str, float]], None]) -> None:
        self._every, self._ranks, self._report = every, ranks, report

    def __call__(self, step: int, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Inspect a step's gradients (a `GradientHook`). A collective."""
        if step % self._every:
            return
        squares: dict[str, list[Tensor]] = {}
        for name, piece in gradients:
            squares.setdefault(layer_of(name), []).append(torch.linalg.vector_norm(piece, dtype=torch.float64).square())
        own = torch.stack([torch.stack(each).sum() for each in squares.values()]).tolist()  # one wait for the device
        totals = self._ranks.sum(own)
        self._report(step, {layer: math.sqrt(total) for layer, total in zip(squares, totals, strict=True)})


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number (`decoder.blocks.3`), or, where there is
    none, up to the parameter's own name (`decoder.head`)."""
    parts = parameter.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if numbered is None else parts[: numbered + 1]) or parameter


# Notes of each rank on its samples: the bad ones, once each, and on demand the id of every clip trained on.


class SampleLog:
    """One rank's notes: `bad_samples/rank-00000.jsonl` and, with `train.trace_samples`, `samples/rank-00000.jsonl`.

    A resumed run drops the notes of the steps that it does again; rank 0 does so for ranks that are no more, too. What
    any rank has noted before is not noted again.
    """

    def __init__(self, config: CommonConfig, ranks: Ranks, step: int) -> None:
        self._name = f"rank-{ranks.rank:05d}.jsonl"
        self._bad, self._trace = config.folder / "bad_samples", config.folder / "samples"
        self._traces, self._ranks = config.train.trace_samples, ranks
        self._records: dict[str, Record] = {}
        self._warned: set[str] = set()
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Go on after `step`: drop the notes of later ones."""
        self.close()
        self._step, self._records = step, {}
        self._known = self._read_known()
        for path in [*self._trace.glob("rank-*.jsonl"), *self._bad.glob("rank-*.jsonl")]:
            rank = int(path.stem.partition("-")[2])
            if rank == self._ranks.rank or (self._ranks.is_main and rank >= self._ranks.world_size):
                Record(path, step).close()
        if self._traces:
            self._open("samples")

    def write(self, step: int, micro: int, batch: Batch) -> None:
        """Note a micro-batch of `step` (counted from 1)."""
        if "samples" in self._records:
            self._records["samples"].write("samples", step, {"micro": micro, "ids": batch.sample_ids.tolist()})
        for sample in batch.bad:
            self._note(step, sample)
        if batch.problem and batch.problem not in self._warned:
            self._warned.add(batch.problem)
            warn(batch.problem)

    def close(self) -> None:
        for record in self._records.values():
            record.close()

    def _note(self, step: int, sample: BadSample) -> None:
        if (sample.shard, sample.key) in self._known:
            return
        self._known.add((sample.shard, sample.key))
        self._open("bad_samples").write("bad_sample", step, sample._asdict())
        warn(f"sample {sample.key} in {sample.shard} is bad and was replaced by another: {sample.reason}")

    def _open(self, kind: str) -> Record:
        if kind not in self._records:
            folder = self._trace if kind == "samples" else self._bad
            self._records[kind] = Record(folder / self._name, self._step)
        return self._records[kind]

    def _read_known(self) -> set[tuple[str, str]]:
        lines = [line for path in self._bad.glob("rank-*.jsonl") for line in read_record(path)]
        return {(line["shard"], line["key"]) for line in lines if line["step"] <= self._step}


# The learning rate as a function of the step.


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up to `lr`, then a cosine to `lr * min_lr_ratio` at the last step. `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
