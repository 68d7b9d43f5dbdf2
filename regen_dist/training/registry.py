"""The training tasks, by `model.kind`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from regen_dist.config import AnyRunConfig
from regen_dist.registry import Entry, Registry
from regen_dist.training.embedder import BaselineTask, EmbedderTask
from regen_dist.training.t2v import TextToVideoTask
from regen_dist.training.tasks import Task

TASKS: Registry[Entry[Callable[[Any, torch.device], Task]]] = Registry(
    "model.kind",
    {"regen": Entry(EmbedderTask), "magvit2": Entry(BaselineTask), "t2v": Entry(TextToVideoTask)},
)


def build_task(config: AnyRunConfig, device: torch.device) -> Task:
    """The task that the config describes."""
    return TASKS[config.model.kind].build(config, device)
