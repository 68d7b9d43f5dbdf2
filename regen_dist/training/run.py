"""One rank of a training run, from its config to its exit code."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from regen_dist.checkpoint.claims import Claims
from regen_dist.checkpoint.reader import warn
from regen_dist.config import AnyRunConfig, save_config
from regen_dist.distributed.base import precision_of
from regen_dist.distributed.determinism import make_repeatable
from regen_dist.distributed.failing import tell
from regen_dist.distributed.ranks import Ranks, process_group, read_environment
from regen_dist.models.attention import require_flash
from regen_dist.models.strips import require_cudnn
from regen_dist.observe.hardware import multiplies_bf16
from regen_dist.observe.watchdog import Watchdog
from regen_dist.training.loop import Trainer
from regen_dist.training.signals import Inbox
from regen_dist.training.stopping import Stopper


def train(
    config: AnyRunConfig, ranks: Ranks | None = None, *, fresh: bool = False, earlier: Inbox | None = None
) -> int:
    """Train as one of the ranks that the environment describes; the same call resumes. Returns the exit code.

    Args:
        config: of the run.
        ranks: this process's place; the environment's by default.
        fresh: start from scratch where the run has checkpoints and none of them is whole.
        earlier: signals that came before this.

    Raises:
        RunBusy: another process trains this run.
        RegenError: whatever a user can mend, on every rank alike where one rank alone could not go on.
    """
    ranks = ranks or read_environment()
    _prepare_process(config, ranks)
    limit_s, lead_s = config.train.time_limit_s, config.train.time_limit_lead_s
    claims = Claims(config)
    if ranks.is_main:  # before anything is touched in the folder of a run that lives
        claims.refuse_living()
    with (
        Watchdog(config.folder, ranks.rank, ranks.world_size, config.guards.hang) as watchdog,
        Stopper(
            config.folder, ranks, time_limit_s=limit_s, lead_s=lead_s, earlier=earlier, lost=lambda: claims.lost
        ) as stopper,
        process_group(ranks, needed=config.engine.kind == "zero3"),
        _held(claims, ranks),
    ):
        trainer = Trainer(config, ranks, mark=watchdog.mark, fresh=fresh, permit=claims.check)
        try:
            if ranks.is_main:  # only now: a config that is refused must not take the place of the run's own
                save_config(config, config.folder)
            return trainer.fit(stopper)
        except BaseException as error:  # before anything is closed, which may wait
            tell(error, ranks.rank, ranks.world_size)
            raise
        finally:
            trainer.close()


@contextmanager
def _held(claims: Claims, ranks: Ranks) -> Iterator[None]:
    """Hold the claims of a run, by rank 0. A collective: where somebody else holds one, every rank raises."""
    ranks.on_main(claims.take)
    try:
        yield
    finally:
        claims.release()


def _prepare_process(config: AnyRunConfig, ranks: Ranks) -> None:
    """Refuse what cannot run here before anything is built, and make the arithmetic repeatable."""
    attention = config.model.attention if config.model.kind == "t2v" else config.model.decoder.attention
    if config.model.kind != "magvit2" and attention.backend == "flash":
        require_flash(ranks.device.type, precision_of(config.engine.precision))
    if config.model.kind != "t2v":  # which has no convolutions
        require_cudnn(ranks.device.type, precision_of(config.engine.precision))
    if ranks.is_main and ranks.device.type == "cpu" and config.engine.precision == "bf16" and not multiplies_bf16():
        warn("this CPU does not multiply bf16 itself; engine.precision=fp32 is several times as fast here")
    make_repeatable(ranks.device, deterministic=config.engine.deterministic)
    # It would write NaN over DeepSpeed's communication buckets, gigabytes a rank that otherwise stay untouched.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
