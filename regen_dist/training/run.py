"""One rank of a training run, from its config to its exit code."""

from __future__ import annotations

import logging
import os
import warnings

import torch

from regen_dist.config import save_config
from regen_dist.config.schema import RunConfig
from regen_dist.distributed.base import precision_of
from regen_dist.distributed.ranks import Ranks, process_group, read_environment
from regen_dist.models.attention import require_flash
from regen_dist.training.loop import Trainer
from regen_dist.training.stopping import Stopper


def train(config: RunConfig, ranks: Ranks | None = None) -> int:
    """Train as one of the ranks that the environment describes; the same call resumes. Returns the exit code.

    Raises:
        RegenError: whatever a user can mend, on every rank alike where one rank alone could not go on.
    """
    ranks = ranks or read_environment()
    _prepare_process(config, ranks)
    with Stopper(config.folder, ranks) as stopper, process_group(ranks, needed=config.engine.kind == "zero3"):
        trainer = Trainer(config, ranks)
        try:
            if ranks.is_main:  # only now: a config that is refused must not take the place of the run's own
                save_config(config, config.folder)
            return trainer.fit(stopper)
        finally:
            trainer.close()


def _prepare_process(config: RunConfig, ranks: Ranks) -> None:
    """Refuse what cannot run here before anything is built, and make the arithmetic repeatable."""
    if config.model.kind == "regen" and config.model.decoder.attention.backend == "flash":
        require_flash(ranks.device.type, precision_of(config.engine.precision))
    if ranks.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would write NaN over DeepSpeed's communication buckets, gigabytes a rank that otherwise stay untouched.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
