"""The training loop of every task: load, step, guard, log, validate, save, stop?"""

from __future__ import annotations

from collections.abc import Generator

from regen_dist.checkpoint.commit import CheckpointStore
from regen_dist.config import config_hash
from regen_dist.config.schema import RunConfig
from regen_dist.data.reading.loader import ClipBatch, clip_batches
from regen_dist.data.reading.training_set import TrainingSet
from regen_dist.data.reading.validation import validation_clip
from regen_dist.distributed.base import StepResult, precision_of
from regen_dist.distributed.engine import build_engine
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import EXIT_OK, EXIT_RESUME, CheckpointError
from regen_dist.models.accounting import training_flops_per_clip
from regen_dist.observe.hardware import peak_tflops
from regen_dist.training.guards import BadSampleGuard, NonFiniteGuard
from regen_dist.training.meter import Meter
from regen_dist.training.reporter import Reporter
from regen_dist.training.sample_log import SampleLog
from regen_dist.training.schedule import learning_rate
from regen_dist.training.stopping import Stopper
from regen_dist.training.tasks import build_task


class Trainer:
    """One rank of a run: builds its parts, resumes from the newest checkpoint, trains."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.task = build_task(config, ranks.device)
        self.engine = build_engine(config, ranks, self.task.build)
        self.store = CheckpointStore(config.folder, ranks)
        self.guard = NonFiniteGuard(config.train.nonfinite_budget)
        self.bad_samples = BadSampleGuard(config.data.max_bad_share)
        self.data = TrainingSet(
            config.data, num_frames=config.model.num_frames, batch_global=config.train.batch_global,
            seed=config.train.seed,
        )  # fmt: skip
        self.step = self._resume()
        self.meter = self._build_meter()
        self.reporter = Reporter(config, ranks, self.step)
        self.reporter.say(self.step, self.data.summary())
        self.sample_log = SampleLog(config, ranks, self.step)
        self.batches = self._batches()
        self.validation_clip = validation_clip(config.data, num_frames=config.model.num_frames)

    def fit(self, stopper: Stopper) -> int:
        """Train to the last step, or until the ranks agree to stop. Returns the exit code."""
        train = self.config.train
        while self.step < train.steps:
            lr = learning_rate(self.config.optimizer, self.step, train.steps)
            result = self._train_step(lr)
            self.step += 1
            self.guard.check(self.step, result)
            if self._due(train.log_every):
                figures = self.meter.read(lr, result) | {"skipped": self.guard.skipped}
                self.reporter.train(self.step, figures)
                self.bad_samples.check(self.step, figures)
            if self._due(train.validate_every):
                self._validate()
            stop = self.ranks.agree(stopper.wanted())
            if stop or self._due(train.save_every):
                self._save()
            if stop and self.step < train.steps:
                self.reporter.say(
                    self.step,
                    f"stopped by {stopper.reason or 'another rank'} after step {self.step}: run it again to go on",
                )
                return EXIT_RESUME
        self.reporter.say(self.step, f"done: {self.step} steps")
        return EXIT_OK

    def close(self) -> None:
        """End the data workers, the record, the progress line and the tracker."""
        self.batches.close()
        self.sample_log.close()
        self.reporter.close()

    def _train_step(self, lr: float) -> StepResult:
        """One optimizer step: every micro-batch forward and backward, then the update."""
        for micro in range(self.config.train.accumulation):
            with self.meter.waiting():
                batch = next(self.batches)
            loss = self.task.loss(self.engine, batch, self.step)
            self.engine.backward(loss.value, is_last=micro + 1 == self.config.train.accumulation)
            self.meter.add(loss.value, loss.figures, self._flops(batch), bad_samples=batch.stand_ins)
            self.sample_log.write(self.step + 1, micro, batch)
        result = self.engine.step(lr)
        self.meter.end_step()
        return result

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.steps

    def _batches(self) -> Generator[ClipBatch]:
        """This rank's micro-batches from the current step on: the data's place is the step alone."""
        train, ranks = self.config.train, self.ranks
        return clip_batches(
            self.data, accumulation=train.accumulation, rank=ranks.rank, world_size=ranks.world_size,
            cursor=self.step * train.batch_global,
        )  # fmt: skip

    def _validate(self) -> None:
        with self.meter.paused():
            self.reporter.validation(self.step, self.task.validate(self.engine, self.validation_clip))

    def _save(self) -> None:
        state = {"num_updates": self.engine.num_updates, "skipped": self.guard.skipped, "data": self.data.identity()}
        state |= {"bad_samples": self.bad_samples.state()}
        keep, digest = self.config.train.keep_checkpoints, config_hash(self.config)
        with self.meter.paused():
            self.store.save(self.step, self.engine.pieces(), self.engine.shapes(), state, digest, keep)

    def _resume(self) -> int:
        """Restore the newest checkpoint, if there is one. Returns the step to go on from."""
        manifest = self.store.latest()
        if manifest is None:
            return 0
        if manifest.shapes != self.engine.shapes():
            raise CheckpointError(
                f"the checkpoint of step {manifest.step} in {self.store.folder} was saved by another model; "
                "give the run another name, or restore the model section of its config"
            )
        before, now = manifest.state["data"], self.data.identity()
        names = [*now, *(name for name in before if name not in now)]
        if changed := [
            f"{name} was {before.get(name, 'not told')}, is {now.get(name, 'not told')}"
            for name in names
            if before.get(name) != now.get(name)
        ]:
            raise CheckpointError(
                f"the run cannot go on at step {manifest.step}, because the order of its data has changed: "
                f"{'; '.join(changed)}. Restore that, or give the run another name"
            )
        self.engine.restore(self.store.reader(manifest), manifest.state["num_updates"])
        self.guard.skipped = manifest.state["skipped"]
        self.bad_samples.restore(manifest.state.get("bad_samples", {}))
        return manifest.step

    def _build_meter(self) -> Meter:
        train, engine = self.config.train, self.config.engine
        peak = train.peak_tflops or peak_tflops(self.ranks.device, precision_of(engine.precision))
        return Meter(self.ranks, train.batch_global, peak)

    def _flops(self, batch: ClipBatch) -> float:
        """Operations that training on a micro-batch needs; buckets differ."""
        clips, _, num_frames, height, width = batch.video.shape
        return clips * training_flops_per_clip(self.config.model, (height, width), num_frames)
