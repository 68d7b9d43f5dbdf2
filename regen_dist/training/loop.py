"""The training step and loop of every task: load, step, guard, log, save, stop? validate."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.profiler import record_function

from regen_dist.checkpoint.folder import newest_good
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.config import AnyRunConfig
from regen_dist.distributed.engine import Engine, StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import EXIT_OK, EXIT_RESUME, CheckpointError, TrainingError
from regen_dist.training.checkpoints import RunCheckpoints, RunProgress
from regen_dist.training.guards import Guards, SkippedSteps, Spike, poison_nonfinite
from regen_dist.training.metrics import RankClock, Reporter, SampleLog, StepMeter, learning_rate
from regen_dist.training.stopping import Stopper
from regen_dist.training.task import Batch, TrainingTask

# The training step: fetch, loss, backward, clip, rate, optimizer, EMA. The loop of a run and every bench of steps make
# it here.


_IN_A_STEP = ("data", "forward and backward", "update")

GradientHook = Callable[[int, Iterable[tuple[str, Tensor]]], None]
"""Sees the gradients of a step (counted from 1) before they are clipped, used and cleared: the name of every parameter,
and this rank's flat float32 piece of its gradient, averaged over micro-batches and ranks (`Engine.named_gradients`).
Called on every rank, so that it may be a collective."""


class Step(NamedTuple):
    """A completed step: its learning rate, its result, and its last micro-batch."""

    lr: float
    result: StepResult
    batch: Batch


class Stepper:
    """One rank's steps, with all that they need and nothing that surrounds them: a bench uses this, a run `Trainer`.

    Args:
        config: config of the run.
        ranks: this process's place.
        task: gives batches and losses.
        engine: holds model and optimizer.
        meter: counts and times.
        step: steps that were made before.
        data_shift: batches of the order that were left out before.
        batches: this rank's micro-batches from there on; opened by default.
        mark: called with this rank's next phase and its step, for the heartbeat.
        gradient_hooks: see the gradients of every step.

    Attributes:
        batches: this rank's micro-batches from the current step on; another source of them may take their place.
    """

    def __init__(
        self,
        config: AnyRunConfig,
        ranks: Ranks,
        task: TrainingTask,
        engine: Engine,
        meter: StepMeter,
        *,
        step: int = 0,
        data_shift: int = 0,
        batches: Iterator[Batch] | None = None,
        mark: Callable[[str, int], None] = lambda phase, step: None,
        gradient_hooks: Sequence[GradientHook] = (),
    ) -> None:
        self.config, self.ranks, self.task, self.engine, self.meter = config, ranks, task, engine, meter
        self.step, self.data_shift = step, data_shift
        self.clock = RankClock(ranks)
        self.gradient_hooks, self._mark_phase = list(gradient_hooks), mark
        self.batches: Iterator[Batch] = self.open_batches() if batches is None else batches

    def train_step(self) -> Step:
        """Make one optimizer step."""
        train, leads = self.config.train, self.engine.rows.leads  # shared samples are counted once
        for micro in range(train.accumulation):
            # Fetch a micro-batch.
            self._mark("data")
            with self.meter.waiting(), self.clock.waiting(), record_function("batches"):
                batch = next(self.batches)
            # Loss and backward: gradients add up over the micro-batches; the last one averages them over the ranks.
            self._mark("forward and backward")
            loss = self.task.loss(self.engine, batch, self.step)
            self.engine.backward(poison_nonfinite(loss.total), is_last=micro + 1 == train.accumulation)
            # Count it, without waiting for the device.
            flops, bad_samples = self.task.flops(batch) * leads, batch.num_replaced * leads
            self.meter.add(loss.value, loss.figures, flops, bad_samples=bad_samples)
            if leads:
                self._fetched(micro, batch)
        self._mark("update")
        # Gradients are complete and not cleared yet: hooks inspect them here.
        for hook in self.gradient_hooks:
            hook(self.step + 1, self.engine.named_gradients())
        # Clip, rate, optimizer, EMA: by the engine, because ZeRO-3 does the first three and the clearing in one.
        lr = learning_rate(self.config.optimizer, self.step, train.steps)
        with record_function("update"):
            result = self.engine.step(lr)
        self.step += 1
        return Step(lr, result, batch)

    def open_batches(self) -> Generator[Batch]:
        """Open this rank's micro-batches from the current step on; the position in the data is the step plus the
        batches left out."""
        rows, cursor = self.engine.rows, (self.step + self.data_shift) * self.config.train.batch_global
        return rows.read(lambda: self.task.batches(rows.readers, cursor))

    def close_batches(self) -> None:
        """End the data workers."""
        if isinstance(self.batches, Generator):
            self.batches.close()

    def _fetched(self, micro: int, batch: Batch) -> None:
        """Note a micro-batch of the current step."""

    def _mark(self, phase: str) -> None:
        """Mark the phase with its step as the record counts steps, from 1: the current step, or the one just made."""
        self._mark_phase(phase, self.step + (phase in _IN_A_STEP))


class StepAgreement(NamedTuple):
    """State that all ranks share after a step: the global mean loss, the number of replacement samples in the global
    batch, whether some rank wants to stop, and whether a save has ended."""

    loss: float
    num_replaced: int
    stop: bool
    saved: bool


class Trainer(Stepper):
    """One rank of a run: trains from its newest checkpoint, with the parts that `run.build_trainer` passes.

    Args:
        config: config of the run.
        ranks: this process's place.
        task: gives batches, losses and validation.
        engine: holds model and optimizer, as of `progress`.
        meter: counts and times.
        guards: stop or turn back a run that goes wrong.
        checkpoints: save engine and guards.
        reporter: reports figures and events.
        sample_log: notes this rank's samples.
        progress: progress of the checkpoint that was loaded.
        mark: called with this rank's next phase and its step, for the heartbeat.
        gradient_hooks: see the gradients of every step.
    """

    def __init__(
        self,
        config: AnyRunConfig,
        ranks: Ranks,
        task: TrainingTask,
        engine: Engine,
        meter: StepMeter,
        *,
        guards: Guards,
        checkpoints: RunCheckpoints,
        reporter: Reporter,
        sample_log: SampleLog,
        progress: RunProgress,
        mark: Callable[[str, int], None] = lambda phase, step: None,
        gradient_hooks: Sequence[GradientHook] = (),
    ) -> None:
        step, data_shift, self.metrics = progress
        super().__init__(
            config, ranks, task, engine, meter,
            step=step, data_shift=data_shift, mark=mark, gradient_hooks=gradient_hooks,
        )  # fmt: skip
        self.guards, self.checkpoints, self.reporter, self.sample_log = guards, checkpoints, reporter, sample_log

    def fit(self, stopper: Stopper) -> int:
        """Train to the last step, or until the ranks agree to stop. Returns the exit code.

        Raises:
            TrainingError: too many steps were skipped, or the last ones; the next start goes on from before them.
        """
        try:
            code = self._fit(stopper)
            if code == EXIT_OK:
                self.guards.nonfinite.check_end(self.step)
                self.reporter.event(self.step, f"done: {self.step} steps")
            return code
        except SkippedSteps as error:
            self._mark("save")
            raise TrainingError(
                f"{error}. {self.checkpoints.point_before(self.step - self.guards.nonfinite.in_a_row)}"
            ) from None

    def _fit(self, stopper: Stopper) -> int:
        train = self.config.train
        if self._starts_with_validation():
            self._validate()
        while self.step < train.steps:
            with self.clock.step():
                made = self.train_step()
            heartbeat = self._agree(stopper)
            self.guards.after_step(self.step, made.result, heartbeat.num_replaced)
            spike = self.guards.spikes.judge(self.step, heartbeat.loss, made.batch.kind)
            if spike is not None:
                self.reporter.event(self.step, f"warning: {spike}")
                if self.config.guards.spike.action == "rollback":
                    self._roll_back(spike)
                    continue
            if self._due(train.log_every):
                self._log(made)
            if self.ranks.world_size > 1 and self._due(train.slow_ranks_every):
                self._mark("log")
                self.reporter.ranks(self.step, self.clock.report())
            if heartbeat.saved:
                self._mark("save")
                self.checkpoints.settle()
            if heartbeat.stop or self._due(self.config.checkpoint.every):
                self._save(wait=heartbeat.stop or self.step == train.steps)
            if heartbeat.stop and self.step < train.steps:  # now: a validation may outlast the time that is left
                why = stopper.reason or "another rank"
                self.reporter.event(self.step, f"stopped by {why} after step {self.step}: run it again to go on")
                return EXIT_RESUME
            if self._due(train.validate_every):  # after the save, which an error in it must not lose
                self._validate()
        return EXIT_OK

    def close(self) -> None:
        """End the data workers, a save in flight, the record, the progress line and the tracker."""
        self._mark("close")
        self.close_batches()
        self.checkpoints.close()
        self.sample_log.close()
        self.reporter.close()

    def _fetched(self, micro: int, batch: Batch) -> None:
        self.sample_log.write(self.step + 1, micro, batch)

    def _agree(self, stopper: Stopper) -> StepAgreement:
        """Exchange the state of all ranks after a step, in one collective."""
        self._mark("agree")
        loss, num_replaced = self.meter.end_step()
        own = [loss, num_replaced, stopper.wanted(), self.checkpoints.finished]
        total, bad, stop, saved = self.ranks.sum([float(value) for value in own])
        return StepAgreement(total / self.ranks.world_size, int(bad), stop > 0, saved > 0)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.steps

    def _log(self, made: Step) -> None:
        self._mark("log")
        figures = self.meter.read(made.lr, made.result) | self.guards.figures()
        self.reporter.train(self.step, figures)
        for warning in self.guards.latents.check(self.step, figures):
            self.reporter.event(self.step, f"warning: {warning}")

    def _starts_with_validation(self) -> bool:
        """Return whether a validation is due before the first step: at the beginning if the config asks for it, and at
        a step whose validation is missing, as a run that is stopped leaves it out. A collective."""
        train = self.config.train
        if self.step == 0:
            return train.validate_at_start
        is_due = self.step < train.steps and self._due(train.validate_every)
        return is_due and not self.ranks.on_main(lambda: self.reporter.has_validation(self.step))

    def _validate(self) -> None:
        self._mark("validate")
        with self.meter.paused():
            began = time.perf_counter()
            result = self.task.validate(self.engine, self._meet)
            self.metrics = result.figures
            self.reporter.validation(self.step, result, time.perf_counter() - began)
        self.checkpoints.rate(self.step, self.metrics)

    def _meet(self) -> None:
        """Wait for the other ranks within a validation, and mark that it goes on: one that is long is no hang. A rank
        that hangs in it is behind those that wait."""
        self._mark("meet")
        self.ranks.barrier()
        self._mark("validate")

    def _save(self, *, wait: bool) -> None:
        self._mark("save")
        with self.meter.paused():
            self.checkpoints.save(RunProgress(self.step, self.data_shift, self.metrics), wait=wait)

    def _roll_back(self, spike: Spike) -> None:
        """Go back, for good, to the newest whole checkpoint before a spike, and continue with the samples after it. A
        collective.

        Raises:
            TrainingError: the run went back `guards.spike.max_rollbacks` times already.
            CheckpointError: there is no checkpoint from before the spike.
        """
        # Allowed once more?
        guards, checkpoints, done = self.guards, self.checkpoints, self.guards.spikes.rollbacks
        if done >= (most := self.config.guards.spike.max_rollbacks):
            raise TrainingError(
                f"{spike}. The run went back {done} times already, guards.spike.max_rollbacks allows {most}. Lower "
                "optimizer.lr or optimizer.clip_norm, look at the samples of these steps (train.trace_samples=true "
                "writes them down), raise guards.spike.max_rollbacks, or let the run go on through spikes with "
                "guards.spike.action=warn"
            )
        self._mark("go back")
        checkpoints.settle()

        # Choose. The loss of a step is that of the weights before it: the update of the step before is suspect, too.
        folder, before = checkpoints.folder, spike.first_step - 1
        target = newest_good(folder, self.ranks, checksums=checkpoints.checksums, before=before)
        if target is None:
            raise CheckpointError(
                f"{folder.url} holds no checkpoint before step {before} to go back to; save more often "
                "(checkpoint.every)"
            )

        # Make the decision permanent, in the manifest and then in the pointer: a run that is killed now resumes from
        # there. Its statistics of losses and latents are the checkpoint's own; counts since then stay.
        counted = {"nonfinite": {"skipped": guards.nonfinite.skipped}, "bad_samples": guards.bad_samples.state()}
        spikes = target.state["guards"].get("spikes", {}) | {"rollbacks": done + 1}
        state = target.state | {
            "data_shift": self.step + self.data_shift - target.step,
            "guards": target.state["guards"] | counted | {"spikes": spikes},
        }

        def decide() -> CheckpointManifest:
            updated = folder.update_manifest(target, state=state, rollbacks=[*checkpoints.rollbacks, target.step])
            folder.set_latest(target.step)
            return updated

        manifest = self.ranks.on_main(decide)
        checkpoints.newest, checkpoints.rollbacks = manifest.step, manifest.rollbacks

        # Load it, drop the records of later steps, and continue with the data after the spike.
        reached = self.step
        self.close_batches()
        self.step, self.data_shift, self.metrics = checkpoints.restore(manifest)
        self.meter.reset()
        self.reporter.rewind(self.step)
        self.sample_log.rewind(self.step)
        self.batches = self.open_batches()
        self.reporter.event(
            self.step,
            f"went back from step {reached} to {self.step}; the {reached - self.step} batches between are left out",
        )
