"""The training tasks, by `model.kind`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from regen_dist.config import AnyRunConfig
from regen_dist.registry import Entry, Registry
from regen_dist.training.embedder import BaselineTask, EmbedderTask
from regen_dist.training.t2v import TextToVideoTask
from regen_dist.training.task import TrainingTask

TASKS: Registry[Entry[Callable[[Any, torch.device], TrainingTask]]] = Registry(
    "model.kind",
    {"regen": Entry(EmbedderTask), "magvit2": Entry(BaselineTask), "t2v": Entry(TextToVideoTask)},
)


def build_task(config: AnyRunConfig, device: torch.device) -> TrainingTask:
    """The task that the config describes."""
    return TASKS[config.model.kind].build(config, device)
