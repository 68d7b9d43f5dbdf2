"""`torch.compile` of a model's blocks for training (`engine.compile`).

Blocks one by one, not the model as a whole: they are where the time goes, they are alike, so that one compilation
serves them all, and what lies between them (recomputation, text, noise) stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from regen_dist.models.layers import Checkpointed

BACKEND = "inductor"
# Compilations of one kind of block before it is left as it is: one for each shape of a batch (images, clips, every
# bucket), with gradients and without.
_MOST_SHAPES = 64


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of every `Checkpointed` part of a model, at their first call for each shape.

    In place (`nn.Module.compile`): the names of parameters, and so checkpoints, stay as they are.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for block in blocks_of(model):
        block.compile(backend=BACKEND, dynamic=False)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that `Checkpointed` parts run one after the other."""
    owners = [module for module in model.modules() if isinstance(module, Checkpointed)]
    lists = [child for owner in owners for child in owner.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]
