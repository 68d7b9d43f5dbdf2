"""The meta device in the place of a GPU: operations that mix its tensors with the CPU's raise, as they do on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regen_dist.distributed.ranks import Ranks

META = torch.device("meta")


@dataclass(frozen=True)
class MetaRanks(Ranks):
    """One rank, whose device is the meta device."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return META


class Answers(TorchDispatchMode):
    """Gives a number where the host asks a tensor of the meta device for one, which has none: 0.5, or False. Counts the
    questions: each makes the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.asked += 1
            return False if args[0].dtype == torch.bool else 0.5
        return function(*args, **(kwargs or {}))
