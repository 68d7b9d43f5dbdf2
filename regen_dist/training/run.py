"""One rank of a training run, from its config to its exit code."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from regen_dist.checkpoint.claims import Claims
from regen_dist.checks.findings import Target
from regen_dist.checks.run import refuse_process
from regen_dist.config import AnyRunConfig, load_saved_config, save_config
from regen_dist.config.files import CONFIG_FILE, write_text_atomically
from regen_dist.distributed.engine import precision_of
from regen_dist.distributed.ranks import Ranks, make_repeatable, process_group, read_environment
from regen_dist.distributed.rendezvous import report_failure
from regen_dist.distributed.zero3 import build_engine
from regen_dist.errors import BackendError, ConfigError
from regen_dist.observe.hang_detector import Watchdog
from regen_dist.observe.hardware import has_native_bf16, peak_tflops
from regen_dist.observe.terminal import warn
from regen_dist.registry import Entry, Registry
from regen_dist.shared_files import IDLE_S, remove_leftovers
from regen_dist.training.checkpoints import RunCheckpoints, has_checkpoints
from regen_dist.training.embedder import BaselineTask, EmbedderTask
from regen_dist.training.guards import Guards
from regen_dist.training.loop import Trainer
from regen_dist.training.metrics import GradientNorms, Reporter, SampleLog, StepMeter, learning_rate
from regen_dist.training.stopping import SignalInbox, Stopper
from regen_dist.training.t2v import TextToVideoTask
from regen_dist.training.task import TrainingTask


def train(
    config: AnyRunConfig, ranks: Ranks | None = None, *, fresh: bool = False, earlier: SignalInbox | None = None
) -> int:
    """Train as one of the ranks that the environment describes; the same call resumes. Returns the exit code.

    Args:
        config: config of the run.
        ranks: this process's place; the environment's by default.
        fresh: start from scratch where the run has checkpoints and none of them is whole.
        earlier: signals that came before this.

    Raises:
        RunBusy: another process trains this run.
        RegenError: an error that a user can fix; on every rank alike if one rank alone could not go on.
    """
    ranks = ranks or read_environment()
    _prepare_process(config, ranks)
    limit_s, lead_s = config.train.time_limit_s, config.train.time_limit_lead_s
    claims = Claims(config)
    if ranks.is_main:  # before anything is changed in the folder of a live run
        claims.refuse_if_taken()
    with (
        Watchdog(config.folder, ranks.rank, ranks.world_size, config.guards.hang) as watchdog,
        Stopper(
            config.folder, ranks, time_limit_s=limit_s, lead_s=lead_s, earlier=earlier, lost=lambda: claims.lost
        ) as stopper,
        process_group(ranks, needed=config.engine.kind == "zero3"),
        _claimed(claims, ranks),
    ):
        trainer = build_trainer(config, ranks, mark=watchdog.mark, fresh=fresh, permit=claims.check)
        try:
            if ranks.is_main:  # only now: a config that is refused must not take the place of the run's own
                for text in replace_config(config, trainer.step):
                    trainer.reporter.event(trainer.step, text)
            return trainer.fit(stopper)
        except BaseException as error:  # before anything is closed, which may wait
            report_failure(error, ranks.rank, ranks.world_size)
            raise
        finally:
            trainer.close()


def build_trainer(
    config: AnyRunConfig,
    ranks: Ranks,
    *,
    mark: Callable[[str, int], None] = lambda phase, step: None,
    fresh: bool = False,
    permit: Callable[[], None] = lambda: None,
) -> Trainer:
    """Build all parts of a run, at the newest checkpoint, and the trainer that they are handed to. A collective.

    Args:
        config: config of the run.
        ranks: this process's place.
        mark: called with this rank's next phase and its step, for the heartbeat.
        fresh: start from scratch where the run has checkpoints and none of them is whole.
        permit: asked by rank 0 before a checkpoint is begun or committed; raises where it may not be.
    """
    task = build_task(config, ranks.device)
    resumes = not fresh and has_checkpoints(config, ranks)
    engine = build_engine(config, ranks, lambda: task.build(ranks, resumes=resumes))
    guards = Guards(config)
    checkpoints = RunCheckpoints(config, ranks, engine, guards, task.data.identity(), permit)
    progress = checkpoints.resume(fresh=fresh)
    if progress.step < config.train.steps:  # what is wrong with it must not end the run at its first validation
        task.read_validation(ranks)
    peak = config.train.peak_tflops or peak_tflops(ranks.device, precision_of(config.engine.precision))
    meter = StepMeter(ranks, config.train.batch_global, peak)
    reporter = Reporter(config, ranks, progress.step)
    reporter.event(progress.step, task.data.summary())
    checkpoints.on_saved = reporter.checkpoint
    every = config.train.grad_norms_every
    hooks = [] if every is None else [GradientNorms(every, ranks, reporter.gradients)]
    return Trainer(
        config, ranks, task, engine, meter,
        guards=guards,
        checkpoints=checkpoints,
        reporter=reporter,
        sample_log=SampleLog(config, ranks, progress.step),
        progress=progress,
        mark=mark,
        gradient_hooks=hooks,
    )  # fmt: skip


def _show_kernels() -> None:
    """Show on stderr which kernel computes attention, as `models.attention_kernels` logs it."""
    logger = logging.getLogger("regen_dist.models.attention_kernels")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)


@contextmanager
def _claimed(claims: Claims, ranks: Ranks) -> Iterator[None]:
    """Hold the claims of a run, by rank 0. A collective: if another process holds one, every rank raises."""
    ranks.on_main(claims.take)
    try:
        yield
    finally:
        claims.release()


def _prepare_process(config: AnyRunConfig, ranks: Ranks) -> None:
    """Refuse what cannot run here before anything is built, and make the arithmetic repeatable."""
    try:
        device = ranks.device
    except BackendError:  # a node without its GPU: when the ranks meet, all hear of it
        if ranks.world_size == 1:
            raise
        return
    refuse_process(config, Target(ranks.world_size, has_gpus=device.type == "cuda"))
    if ranks.is_main and device.type == "cpu" and config.engine.precision == "bf16" and not has_native_bf16():
        warn("this CPU does not multiply bf16 itself; engine.precision=fp32 is several times as fast here")
    make_repeatable(device, deterministic=config.engine.deterministic)
    # It would write NaN over DeepSpeed's communication buckets, gigabytes a rank that otherwise stay untouched.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if ranks.is_main:
        _show_kernels()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours


TASKS: Registry[Entry[Callable[[Any, torch.device], TrainingTask]]] = Registry(
    "model.kind",
    {"regen": Entry(EmbedderTask), "magvit2": Entry(BaselineTask), "t2v": Entry(TextToVideoTask)},
)


def build_task(config: AnyRunConfig, device: torch.device) -> TrainingTask:
    """The task that the config describes."""
    return TASKS[config.model.kind].build(config, device)


# The config of a run folder when the run goes on by another: changes are reported, and the earlier one is kept.
#
# RUN/config.yaml             the current one
# RUN/config-00000400.yaml    the one before it, by which the run came to step 400


def replace_config(config: AnyRunConfig, step: int) -> list[str]:
    """Make `config` the one of its run folder, from `step` on. Returns what to report: each key that has
    changed, and the learning rate before and after. If the disk takes no config, the run goes on, with a warning."""
    messages: list[str] = []
    remove_leftovers(config.folder, idle_s=IDLE_S)
    try:
        if (config.folder / CONFIG_FILE).is_file():
            messages = _describe_changes(config, step)
            if messages:
                messages.append(f"the earlier config is {_keep_earlier_config(config.folder, step)}")
        save_config(config, config.folder)
    except OSError as error:
        messages.append(f"warning: {config.folder / CONFIG_FILE} is not the config of this start: {error}")
    return messages


def _describe_changes(config: AnyRunConfig, step: int) -> list[str]:
    try:
        earlier = load_saved_config(config.folder)
    except ConfigError as error:
        return [f"the config was replaced after step {step}; it cannot be compared: {error}"]
    old, new = (_flat(each.model_dump(mode="json")) for each in (earlier, config))
    keys = [key for key in {**old, **new} if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    differences = [f"{key}: {old.get(key, _ABSENT)} → {new.get(key, _ABSENT)}" for key in keys]
    if not differences:
        return []
    return [f"the config changed after step {step}: {'; '.join(differences)}", *_describe_rates(earlier, config, step)]


_ABSENT = "(none)"


def _describe_rates(earlier: AnyRunConfig, config: AnyRunConfig, step: int) -> list[str]:
    """Compare the learning rate of the next step with the one by the earlier config; empty if they are the same."""
    now = learning_rate(config.optimizer, step, config.train.steps)
    would = learning_rate(earlier.optimizer, step, earlier.train.steps)
    before = learning_rate(earlier.optimizer, max(step - 1, 0), earlier.train.steps)
    if now == would and step < earlier.train.steps:
        return []
    last = f"; step {step} had {before:.4g}" if step else ""
    return [f"the learning rate of step {step + 1} is {now:.4g}, by the earlier config it was {would:.4g}{last}"]


def _keep_earlier_config(folder: Path, step: int) -> Path:
    """A copy of the config that is there, under a name that is free, or that holds the same."""
    text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    stem, number = f"config-{step:08d}", 1
    while True:
        path = folder / (f"{stem}.yaml" if number == 1 else f"{stem}-{number}.yaml")
        if not path.exists():
            write_text_atomically(path, text)
            return path
        if path.read_text(encoding="utf-8") == text:
            return path
        number += 1


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
