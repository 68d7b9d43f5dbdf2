"""Small checkpoints of one parameter, whose value is their step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import CheckpointManifest
from tests.helpers.checkpoints import folder_of, write_checkpoint

SHAPES = {"weight": [2, 3]}
Write = Callable[..., CheckpointManifest]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(step, …)` commits a checkpoint to the run in `tmp_path`."""

    def write(step: int, **more: Any) -> CheckpointManifest:
        return write_checkpoint(tmp_path, step, {"master/weight": torch.full((6,), float(step))}, SHAPES, **more)

    return write


@pytest.fixture
def folder(tmp_path: Path, write: Write) -> CheckpointFolder:
    """Three checkpoints: of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        write(step)
    return folder_of(tmp_path)
