"""Checkpoints of a run: the choice of the one to start from, its content, and the handling of a failed save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.checkpoint.manifest import CheckpointManifest, own_run_id
from regen_dist.checkpoint.saver import Outcome, Saver
from regen_dist.checkpoint.shards import nonfinite
from regen_dist.checks.findings import refuse
from regen_dist.checks.resume import another_discriminator, another_model, another_order, lost
from regen_dist.config import AnyRunConfig, config_hash
from regen_dist.config.version import code_version
from regen_dist.data.storage.connection import limits_of
from regen_dist.distributed.engine import Engine
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError, NoGoodCheckpoint, RegenError, StoreUnavailable
from regen_dist.observe.terminal import warn
from regen_dist.training.guards import Guards

_CLOSE_S = 60.0  # for a save in flight when a run ends with an error


def has_checkpoints(config: AnyRunConfig, ranks: Ranks) -> bool:
    """Return whether the run has any checkpoint, whole or not. A collective."""
    folder = CheckpointFolder(config.checkpoints, limits_of(config.data.read))
    return ranks.on_main(lambda: bool(folder.steps()))


class RunProgress(NamedTuple):
    """Progress of a run: optimizer steps made, batches of the data order that were left out, and the metrics of the
    newest validation."""

    step: int
    data_shift: int
    metrics: dict[str, float]


class RunCheckpoints:
    """Checkpoints of one run: save the state of its engine and guards, and load it. Collective throughout.

    Args:
        config: config of the run.
        ranks: ranks of the job.
        engine: holds the tensors.
        guards: hold what they have counted.
        identity: identity of the data's order (`TrainingSet.identity`).
        permit: asked by rank 0 before it changes anything there; raises where it may not.

    Attributes:
        folder: folder or URL of the checkpoints.
        newest: the step of the newest one that is committed.
        rollbacks: the steps that the run went back to.
        on_saved: called with the outcome of every save that has ended.
    """

    def __init__(
        self,
        config: AnyRunConfig,
        ranks: Ranks,
        engine: Engine,
        guards: Guards,
        identity: dict[str, str],
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._ranks, self._engine, self._guards = config, ranks, engine, guards
        self._shapes, self._identity = engine.shapes(), identity
        self.folder = CheckpointFolder(config.checkpoints, limits_of(config.data.read), permit)
        self._run_id = ""
        self._saver = Saver(self.folder, ranks, config.checkpoint)
        self.on_saved: Callable[[Outcome], None] = lambda outcome: None
        self.newest: int | None = None
        self.rollbacks: list[int] = []
        self._permit = permit
        self._rated: RunProgress | None = None  # step and figures of a validation after its save began
        self._hash = config_hash(config)
        self._version = code_version() if ranks.is_main else ""  # rank 0 writes the manifest
        self._topology = {
            "world_size": ranks.world_size,
            "engine": config.engine.kind,
            "precision": config.engine.precision,
        }

    def resume(self, *, fresh: bool = False) -> RunProgress:
        """Go on from the newest whole checkpoint; from the beginning where there is none. One whose sizes are right may
        still turn out to be damaged.

        Args and Raises: see `choose`.
        """
        manifest = self.choose(fresh=fresh)
        try:
            return self.restore(manifest)
        except CheckpointError as error:
            warn(str(error))
            return self.restore(self.choose(doubt=True))

    def restore(self, manifest: CheckpointManifest | None) -> RunProgress:
        """Load a checkpoint into engine and guards; None is the beginning, which they are at when they are built.

        Raises:
            CheckpointError: it cannot be read, or holds values that are not finite; on every rank.
        """
        if manifest is None:
            return RunProgress(0, 0, {})
        self._engine.restore(self.folder.reader(manifest), manifest.state["num_updates"])
        if (trainer := self._engine.discriminator) is not None:
            state = manifest.state.get("companion")
            shapes = {} if state is None else state["shapes"]
            trainer.restore(self.folder.reader(replace(manifest, shapes=shapes)), state)
        if self._ranks.agree(bool(nonfinite(self._engine.pieces()))):
            raise CheckpointError(
                f"the checkpoint of step {manifest.step} in {self.folder.url} holds values that are not finite; an "
                "earlier one may be whole"
            )
        self._guards.restore(manifest.state["guards"])
        return RunProgress(manifest.step, manifest.state["data_shift"], manifest.metrics)

    def choose(self, *, fresh: bool = False, doubt: bool = False) -> CheckpointManifest | None:
        """The checkpoint to go on from; None to start from scratch.

        Args:
            fresh: start from scratch where there were checkpoints and none of them is whole.
            doubt: compare checksums, whatever the config says.

        Raises:
            CheckpointError: it does not belong to this run, this model or this data, or none is whole, or the run's
                record lists checkpoints and there are none.
        """
        try:
            manifest = newest_good(self.folder, self._ranks, checksums=self.checksums or fresh or doubt)
            if manifest is None:
                self._ranks.on_main(lambda: refuse(lost(self._config)))
        except NoGoodCheckpoint as error:
            if not fresh:
                raise
            warn(f"starting from scratch, as --fresh asks: {error}")
            manifest = None
        self._run_id = self._ranks.on_main(lambda: own_run_id(self._config, manifest))
        if manifest is not None:
            # The same model, discriminator and order of the data, as `regen check` looks for beforehand.
            trainer = self._engine.discriminator
            refuse(another_model(self._config, manifest, self._shapes))
            refuse(another_discriminator(self._config, manifest, None if trainer is None else trainer.shapes()))
            refuse(another_order(self._config, manifest, self._identity))
            self.newest, self.rollbacks = manifest.step, manifest.rollbacks
        return manifest

    def save(self, progress: RunProgress, *, wait: bool) -> None:
        """Save, unless this step is committed already (a run that is stopped right after it resumed).

        Args:
            progress: progress of the run.
            wait: true to wait for the commit; else a thread writes while training goes on.

        Raises:
            CheckpointError, StoreUnavailable: this save failed and was waited for, or the one before failed and the
                policy is to stop.
        """
        self.settle()
        if progress.step == self.newest:
            return
        self._rated = None
        self._saver.save(self._manifest(progress), self._engine.pieces())
        if wait or not self._config.checkpoint.asynchronous:
            self.settle(must_succeed=wait)

    @property
    def finished(self) -> bool:
        """Return whether this rank's part of a save has ended since the last `settle`: vote on it, then `settle`."""
        return self._saver.finished

    def settle(self, *, must_succeed: bool = False) -> None:
        """Wait for the save in flight, if there is one.

        Raises:
            CheckpointError, StoreUnavailable: it failed, or the store gave no answer, and `must_succeed` or
                checkpoint.on_failure=stop; older checkpoints are untouched.
        """
        outcome = self._saver.settle()
        if outcome is None:
            return
        self.on_saved(outcome)
        if not outcome.problem:
            self.newest = outcome.step
            self._write_figures()
            return
        text = f"the checkpoint of step {outcome.step} was not saved: {outcome.problem}"
        if must_succeed or self._config.checkpoint.on_failure == "stop":
            kind = StoreUnavailable if outcome.is_outage else CheckpointError  # a launcher tries again after an outage
            raise kind(
                f"{text}. The older checkpoints in {self.folder.url} are untouched"
                "; run the same command again when the cause is fixed"
            )
        warn(f"{text}. Training goes on (checkpoint.on_failure=continue)")

    def rate(self, step: int, metrics: dict[str, float]) -> None:
        """Put the figures of a validation into the checkpoint of its step, if there is one: now, or once it is
        committed."""
        self._rated = RunProgress(step, 0, metrics)
        self._write_figures()

    def _write_figures(self) -> None:
        if self._rated is None or self._rated.step != self.newest or not self._ranks.is_main:
            return
        try:
            self._permit()
            self.folder.update_manifest(self.folder.manifest(self.newest), metrics=self._rated.metrics)
        except (RegenError, OSError) as error:  # a full disk costs no training
            warn(f"the checkpoint of step {self.newest} has not got the figures of its validation: {error}")

    def point_before(self, step: int) -> str:
        """Let the next start go on from before a step whose update may have broken the weights: every step after it was
        skipped. Nothing is deleted. A collective. Returns what was done, in words."""
        self.settle()
        return self._ranks.on_main(lambda: self._point_before(step))

    def _point_before(self, step: int) -> str:
        nothing = f"There is no checkpoint from before them in {self.folder.url}; begin anew, under another name"
        if self.newest is None:
            return nothing
        newest = self.folder.manifest(self.newest)
        steps = [each for each in self.folder.steps() if each < step]
        earlier = [each for each in map(self.folder.manifest, steps) if each.is_followed_by(newest)]
        good = [each.step for each in earlier if not self.folder.problems(each, checksums=False)]
        if not good:
            return nothing
        self.folder.set_latest(good[-1])
        return f"The same command goes on from step {good[-1]}, the last checkpoint from before them"

    def close(self) -> None:
        """Let a save in flight end, for a while: the run ends with an error of its own, which is the one to report."""
        self._saver.settle(_CLOSE_S)

    def _manifest(self, progress: RunProgress) -> CheckpointManifest:
        state: dict[str, Any] = {"num_updates": self._engine.num_updates, "data_shift": progress.data_shift}
        if self._engine.discriminator is not None:  # its shapes lie here: an export takes those of the model
            state["companion"] = self._engine.discriminator.state()
        return CheckpointManifest(
            step=progress.step,
            samples=progress.step * self._config.train.batch_global,
            config_hash=self._hash,
            version=self._version,
            topology=self._topology,
            state=state | {"guards": self._guards.state(), "data": self._identity},
            metrics=progress.metrics,
            rollbacks=self.rollbacks,
            shapes=self._shapes,
            run_id=self._run_id,
        )

    @property
    def checksums(self) -> bool:
        """Return whether every byte of a checkpoint is compared before it is loaded."""
        return self._config.checkpoint.verify == "checksums"
