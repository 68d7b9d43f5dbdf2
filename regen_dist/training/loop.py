"""The training loop of every task: load, step, guard, log, validate, save, stop?"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from regen_dist.checkpoint.manifest import Manifest
from regen_dist.checkpoint.reader import warn
from regen_dist.checkpoint.saver import Outcome
from regen_dist.checkpoint.shards import nonfinite
from regen_dist.config import AnyRunConfig
from regen_dist.distributed.base import StepResult, precision_of
from regen_dist.distributed.engine import build_engine
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import EXIT_OK, EXIT_RESUME, CheckpointError, TrainingError
from regen_dist.observe.hardware import peak_tflops
from regen_dist.training.checkpoints import RunCheckpoints, has_checkpoints
from regen_dist.training.guards import Guards, SkippedSteps, nowhere_finite
from regen_dist.training.meter import Meter
from regen_dist.training.reporter import Reporter
from regen_dist.training.sample_log import SampleLog
from regen_dist.training.schedule import learning_rate
from regen_dist.training.slow_ranks import RankClock
from regen_dist.training.spikes import Spike
from regen_dist.training.stopping import Stopper
from regen_dist.training.tasks import Batch, build_task

_IN_A_STEP = ("data", "forward and backward", "update")


class Pulse(NamedTuple):
    """What all ranks know after a step: the global mean loss, the stand-ins among the global batch's clips, whether
    some rank wants to stop, and whether a save has ended."""

    loss: float
    stand_ins: int
    stop: bool
    saved: bool


class Trainer:
    """One rank of a run: builds its parts, resumes from the newest checkpoint, trains.

    Args:
        config: of the run.
        ranks: this process's place.
        mark: told what this rank does next, and in which step: for its heartbeat.
        fresh: start from scratch where the run has checkpoints and none of them is whole.
        permit: asked by rank 0 before a checkpoint is begun or committed; raises where it may not be.
    """

    def __init__(
        self,
        config: AnyRunConfig,
        ranks: Ranks,
        *,
        mark: Callable[[str, int], None] = lambda phase, step: None,
        fresh: bool = False,
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.ranks, self._tell = config, ranks, mark
        self.task = build_task(config, ranks.device)
        resumes = not fresh and has_checkpoints(config, ranks)
        self.engine = build_engine(config, ranks, lambda: self.task.build(ranks, resumes=resumes))
        self.guards = Guards(config)
        self.checkpoints = RunCheckpoints(
            config, ranks, self.engine.shapes(), self.task.data.identity(), self._saved, permit
        )
        self.step, self.data_shift, self.metrics = 0, 0, dict[str, float]()
        self._resume(fresh)
        self.meter, self.clock = self._build_meter(), RankClock(ranks)
        self.reporter = Reporter(config, ranks, self.step)
        self.reporter.say(self.step, self.task.data.summary())
        self.sample_log = SampleLog(config, ranks, self.step)
        self.batches = self._batches()

    def fit(self, stopper: Stopper) -> int:
        """Train to the last step, or until the ranks agree to stop. Returns the exit code.

        Raises:
            TrainingError: too many steps were skipped, or the last ones; the next start goes on from before them.
        """
        try:
            code = self._fit(stopper)
            if code == EXIT_OK:
                self.guards.nonfinite.check_end(self.step)
                self.reporter.say(self.step, f"done: {self.step} steps")
            return code
        except SkippedSteps as error:
            self._mark("save")
            raise TrainingError(
                f"{error}. {self.checkpoints.point_before(self.step - self.guards.nonfinite.in_a_row)}"
            ) from None

    def _fit(self, stopper: Stopper) -> int:
        train = self.config.train
        if self.step == 0 and train.validate_at_start:
            self._validate()
        while self.step < train.steps:
            lr = learning_rate(self.config.optimizer, self.step, train.steps)
            with self.clock.step():
                result, batch = self._train_step(lr)
            self.step += 1
            pulse = self._pulse(stopper)
            self.guards.after_step(self.step, result, pulse.stand_ins)
            spike = self.guards.spikes.judge(self.step, pulse.loss, batch.kind)
            if spike and self._went_back(spike):
                continue
            if self._due(train.log_every):
                self._log(lr, result)
            if self.ranks.world_size > 1 and self._due(train.slow_ranks_every):
                self._mark("log")
                self.reporter.ranks(self.step, self.clock.report())
            if self._due(train.validate_every):
                self._validate()
            if pulse.saved:
                self._mark("save")
                self.checkpoints.settle()
            if pulse.stop or self._due(self.config.checkpoint.every):
                self._save(wait=pulse.stop or self.step == train.steps)
            if pulse.stop and self.step < train.steps:
                why = stopper.reason or "another rank"
                self.reporter.say(self.step, f"stopped by {why} after step {self.step}: run it again to go on")
                return EXIT_RESUME
        return EXIT_OK

    def close(self) -> None:
        """End the data workers, a save in flight, the record, the progress line and the tracker."""
        self._mark("close")
        self.batches.close()
        self.checkpoints.close()
        self.sample_log.close()
        self.reporter.close()

    def _train_step(self, lr: float) -> tuple[StepResult, Batch]:
        """One optimizer step: every micro-batch forward and backward, then the update."""
        for micro in range(self.config.train.accumulation):
            self._mark("data")
            with self.meter.waiting(), self.clock.waiting():
                batch = next(self.batches)
            self._mark("forward and backward")
            loss = self.task.loss(self.engine, batch, self.step)
            self.engine.backward(nowhere_finite(loss.value), is_last=micro + 1 == self.config.train.accumulation)
            leads = self.engine.rows.leads  # what ranks share is counted once
            flops, bad_samples = self.task.flops(batch) * leads, batch.stand_ins * leads
            self.meter.add(loss.value, loss.figures, flops, bad_samples=bad_samples)
            if leads:
                self.sample_log.write(self.step + 1, micro, batch)
        self._mark("update")
        return self.engine.step(lr), batch

    def _pulse(self, stopper: Stopper) -> Pulse:
        """What the ranks tell each other after every step, in one collective."""
        self._mark("agree")
        loss, stand_ins = self.meter.end_step()
        own = [loss, stand_ins, stopper.wanted(), self.checkpoints.finished]
        total, bad, stop, saved = self.ranks.sum([float(value) for value in own])
        return Pulse(total / self.ranks.world_size, int(bad), stop > 0, saved > 0)

    def _mark(self, phase: str) -> None:
        """Steps are told as the record counts them, from 1: the one at work, or the one just made."""
        self._tell(phase, self.step + (phase in _IN_A_STEP))

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.steps

    def _log(self, lr: float, result: StepResult) -> None:
        self._mark("log")
        figures = self.meter.read(lr, result) | self.guards.figures()
        self.reporter.train(self.step, figures)
        for warning in self.guards.latents.check(self.step, figures):
            self.reporter.say(self.step, f"warning: {warning}")

    def _validate(self) -> None:
        self._mark("validate")
        with self.meter.paused():
            result = self.task.validate(self.engine)
            self.metrics = result.figures
            self.reporter.validation(self.step, result)

    def _save(self, *, wait: bool) -> None:
        self._mark("save")
        state = {"num_updates": self.engine.num_updates, "data_shift": self.data_shift, "guards": self.guards.state()}
        with self.meter.paused():
            self.checkpoints.save(self.step, self.engine.pieces(), state, self.metrics, wait=wait)

    def _saved(self, outcome: Outcome) -> None:
        self.reporter.checkpoint(outcome)

    def _resume(self, fresh: bool) -> None:
        """Be where the newest whole checkpoint is. One whose sizes are right may still turn out to be damaged."""
        manifest = self.checkpoints.newest(fresh=fresh)
        try:
            self._restore(manifest)
        except CheckpointError as error:
            warn(str(error))
            self._restore(self.checkpoints.newest(doubt=True))

    def _restore(self, manifest: Manifest | None) -> None:
        """Be where a checkpoint is; None is the beginning."""
        if manifest is None:
            return
        self.engine.restore(self.checkpoints.reader(manifest), manifest.state["num_updates"])
        if self.ranks.agree(bool(nonfinite(self.engine.pieces()))):
            raise CheckpointError(
                f"the checkpoint of step {manifest.step} in {self.checkpoints.folder.url} holds values that are not "
                "finite; an earlier one may be whole"
            )
        self.guards.restore(manifest.state["guards"])
        self.step, self.data_shift, self.metrics = manifest.step, manifest.state["data_shift"], manifest.metrics

    def _went_back(self, spike: Spike) -> bool:
        """Tell of a spike; if the config says so, go back to a checkpoint from before it, to go on with the samples
        that come after it."""
        self.reporter.say(self.step, f"warning: {spike}")
        if self.config.guards.spike.action != "rollback":
            return False
        self._mark("go back")
        self.guards.spikes.allow_rollback(spike)
        reached, next_batch = self.step, self.step + self.data_shift

        def beyond_the_spike(manifest: Manifest) -> dict[str, Any]:
            guards = self.guards.after_going_back(manifest.state["guards"])
            return manifest.state | {"data_shift": next_batch - manifest.step, "guards": guards}

        # The loss of a step is that of the weights before it: the update of the step before is suspect too.
        self._reopen(self.checkpoints.go_back(before=spike.first_step - 1, state=beyond_the_spike))
        self.reporter.say(
            self.step,
            f"went back from step {reached} to {self.step}; the {reached - self.step} batches between are left out",
        )
        return True

    def _reopen(self, manifest: Manifest) -> None:
        """Go on from a checkpoint within the same start."""
        self.batches.close()
        self.sample_log.close()
        self._restore(manifest)
        self.meter = self._build_meter()
        self.reporter.rewind(self.step)
        self.sample_log = SampleLog(self.config, self.ranks, self.step)
        self.batches = self._batches()

    def _batches(self) -> Generator[Batch]:
        """This rank's micro-batches from the current step on: the data's place is the step and what was left out."""
        rows, cursor = self.engine.rows, (self.step + self.data_shift) * self.config.train.batch_global
        return rows.read(lambda: self.task.batches(rows.readers, cursor))

    def _build_meter(self) -> Meter:
        train, engine = self.config.train, self.config.engine
        peak = train.peak_tflops or peak_tflops(self.ranks.device, precision_of(engine.precision))
        return Meter(self.ranks, train.batch_global, peak)
