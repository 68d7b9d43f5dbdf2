"""The package magvit2-pytorch at 32-fold temporal compression, with random weights.

It imports torchvision for the weights of a perceptual loss, and a trainer, which imports more. Neither is needed to
encode and decode, and torchvision's builds on PyPI do not import beside a CPU build of torch: where one of them is
missing, a name without content stands in for it.
"""

from __future__ import annotations

import enum
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CODE_BITS = 18  # of a token: the paper's codebook (Yu et al., 2024) of 2**18 words
# As in the package's own example, with as many halvings of time as k = 32 takes.
_LAYERS = (
    "residual",
    "compress_space",
    ("consecutive_residual", 2),
    "compress_space",
    ("consecutive_residual", 2),
    "linear_attend_space",
    "compress_space",
    ("consecutive_residual", 2),
    "attend_space",
    *("compress_time", ("consecutive_residual", 2)) * 5,
    "attend_time",
)
_WIDEST = 512  # channels; the package doubles them at each of the eight halvings


class Magvit2Coder:
    """Encodes to tokens and decodes them.

    Raises:
        ImportError: magvit2-pytorch, or what it needs, is not installed.
    """

    def __init__(self) -> None:
        self.model = _tokenizer()(
            image_size=256,  # its `forward` alone looks at it
            init_dim=64,
            layers=_LAYERS,
            max_dim=_WIDEST,
            codebook_size=2**CODE_BITS,
            use_gan=False,
            perceptual_loss_weight=0.0,
            flash_attn=False,
        ).eval()

    def encode(self, video: Tensor) -> Tensor:
        """[1, 3, T, H, W] to the quantised [1, C, t, h, w]."""
        quantized: Tensor = self.model.encode(video, quantize=True)[0]
        return quantized

    def decode(self, latents: Tensor) -> Tensor:
        """[1, C, t, h, w] to [1, 3, T, H, W]."""
        frames: Tensor = self.model.decode(latents)
        return frames

    def bits(self, latents: Tensor) -> int:
        """Of the tokens."""
        return CODE_BITS * torch.Size((latents.shape[0], *latents.shape[2:])).numel()


def _tokenizer() -> Any:
    for name, content in _stand_ins().items():
        try:
            import_module(name)
        except (ImportError, RuntimeError):  # torchvision says RuntimeError where its operators do not fit torch
            sys.modules[name] = content
    return import_module("magvit2_pytorch.magvit2_pytorch").VideoTokenizer


def _stand_ins() -> dict[str, ModuleType]:
    models, vision, trainer = map(ModuleType, ("torchvision.models", "torchvision", "magvit2_pytorch.trainer"))
    weights = enum.Enum("VGG16_Weights", "DEFAULT", module="torchvision.models")  # type: ignore[misc]
    setattr(models, "VGG16_Weights", weights)  # noqa: B010 - a module's attribute that no type knows
    setattr(vision, "models", models)  # noqa: B010
    setattr(trainer, "VideoTokenizerTrainer", None)  # noqa: B010
    return {each.__name__: each for each in (vision, models, trainer)}
