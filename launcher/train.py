"""Training on this machine: the config is checked here, before any rank starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.local import launch
from regen_dist.checkpoint.claims import Claims
from regen_dist.config import load_config
from regen_dist.config.worldsize import clips_per_rank
from regen_dist.programs import regen


def train_locally(config: Path, overrides: Sequence[str], *, ranks: int, fresh: bool = False) -> int:
    """Train `config` on `ranks` processes of this machine; returns their exit code (see `launcher.local.launch`).

    Raises:
        ConfigError: the config is wrong, or does not fit this number of ranks.
        RunBusy: another process trains this run.
    """
    checked = load_config(config, overrides)
    clips_per_rank(checked, ranks)
    Claims(checked).refuse_living()
    command = regen("train", *(["--fresh"] if fresh else []), str(config), *overrides)
    return launch(command, ranks=ranks, logs=checked.folder / "logs")
