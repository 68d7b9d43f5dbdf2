"""The codecs that are compared, by name; those of this project by the stem of their config."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.codec_cost.magvit2 import Magvit2Coder
from regen_dist.evaluation.codec_cost.others import diffusers_coder
from regen_dist.evaluation.codec_cost.ours import OwnCoder, count_own, own_config
from regen_dist.evaluation.codec_cost.sizes import Coder, Counted, Size

CONFIGS = Path("configs/embedder")
REFERENCES = {4: "fast_k4", 8: "fast_k8", 16: "fast_k16", 32: "fast_k32"}  # ours, by temporal compression
_OWN = (*REFERENCES.values(), *(f"regen_k{k}" for k in REFERENCES), "nano")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class System:
    """A codec that can be compared.

    Attributes:
        name: of this project's, the stem of a config in `CONFIGS`.
        temporal_compression: frames for each latent frame; of this project's, k.
        build: the codec, or None for this project's.
        needs: the package that has it.
    """

    name: str
    temporal_compression: int
    build: Callable[[], Any] | None = None
    needs: str = ""

    @property
    def is_own(self) -> bool:
        """Whether it is this project's."""
        return self.build is None

    def coder(self, precision: str) -> Coder:
        """The codec with random weights. Raises ImportError where its package is not installed."""
        if self.build is None:
            return OwnCoder(own_config(CONFIGS / f"{self.name}.yaml", precision))
        coder = self.build()
        coder.model.to(DTYPES[precision])
        return coder  # type: ignore[no-any-return]

    def count(self, size: Size) -> Counted:
        """Its shapes and operations, without its memory. Raises whatever it does at a size that it does not take."""
        if self.build is None:
            return count_own(own_config(CONFIGS / f"{self.name}.yaml", "fp32").model, size)
        return count_other(self.build, size)


def systems() -> list[System]:
    """All that can be compared, this project's first."""
    own = [own_config(CONFIGS / f"{name}.yaml", "fp32").model for name in _OWN]
    found = [System(name, model.temporal_compression) for name, model in zip(_OWN, own, strict=True)]
    diffusers: list[tuple[str, int, dict[str, Any]]] = [
        ("AutoencoderKLWan", 4, {}),
        ("AutoencoderKLCogVideoX", 4, {}),
        ("AutoencoderKLCosmos", 4, {"temporal_compression_ratio": 4}),
        ("AutoencoderKLCosmos", 8, {"temporal_compression_ratio": 8}),
        ("AutoencoderKLLTXVideo", 8, {}),
    ]
    for name, k, options in diffusers:
        called = f"{name} {k}x" if name == "AutoencoderKLCosmos" else name
        found.append(System(called, k, diffusers_coder(name, **options), "diffusers"))
    return [*found, System("magvit2-pytorch", 32, Magvit2Coder, "magvit2-pytorch")]


def chosen(pattern: str) -> list[System]:
    """Those whose names a regular expression finds.

    Raises:
        ConfigError: it is none, or finds none.
    """
    try:
        found = [system for system in systems() if re.search(pattern, system.name)]
    except re.error as error:
        raise ConfigError(f"--systems {pattern!r} is no regular expression: {error}") from error
    if not found:
        raise ConfigError(f"--systems {pattern!r} finds none of {', '.join(each.name for each in systems())}")
    return found


def named(name: str) -> System:
    """One of them."""
    return next(system for system in systems() if system.name == name)


def count_other(build: Callable[[], Any], size: Size) -> Counted:
    """Count a codec of another package with tensors that have no storage."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        coder = build()
        video = torch.empty(1, 3, *size)
        with FlopCounterMode(display=False) as encoding:
            latents = coder.encode(video)
        with FlopCounterMode(display=False) as decoding:
            frames = coder.decode(latents)
        check_frames(frames, size.frames)
        parameters = sum(each.numel() for each in coder.model.parameters())
        flops = encoding.get_total_flops(), decoding.get_total_flops()
        return Counted(parameters, *flops, (tuple(latents.shape),), coder.bits(latents))


def check_frames(decoded: Any, frames: int) -> None:
    """Make sure that a codec gives the frames that it was given.

    Args:
        decoded: [1, 3, T, H, W], or a list of frames.
        frames: that there were.

    Raises:
        DataError: it gives more or fewer.
    """
    found = decoded.shape[2] if isinstance(decoded, torch.Tensor) else len(decoded)
    if found != frames:
        raise DataError(f"gives {found} frames of a clip of {frames}")
