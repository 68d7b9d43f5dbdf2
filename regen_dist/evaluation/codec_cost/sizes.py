"""Sizes of clips, and what is said of a codec at one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from regen_dist.errors import ConfigError


class Size(NamedTuple):
    """Frames and sides of a clip."""

    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def parse_size(text: str) -> Size:
    """FRAMESxHEIGHTxWIDTH, as in 17x64x64.

    Raises:
        ConfigError: it is something else.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ConfigError(f"the size {text!r} is none: give FRAMESxHEIGHTxWIDTH, as in 17x64x64")
    return Size(*map(int, found.groups()))


@dataclass(frozen=True)
class Counted:
    """What is known of a codec without running it.

    Attributes:
        parameters: of encoder and decoder.
        encode_flops, decode_flops: of the clip, one decoder step; a multiplication with an addition counts as two.
        latents: shapes of what is kept.
        latent_bits: of it: 16 for each real number, or those of its tokens.
    """

    parameters: int
    encode_flops: int
    decode_flops: int
    latents: tuple[tuple[int, ...], ...]
    latent_bits: int

    def facts(self, size: Size) -> dict[str, Any]:
        """As plain values."""
        return {
            "parameters": self.parameters,
            "encode_flops": self.encode_flops,
            "decode_flops": self.decode_flops,
            "latents": [list(shape) for shape in self.latents],
            "bits_per_pixel": self.latent_bits / size.pixels,
        }


class Coder(Protocol):
    """A codec with random weights, ready to work."""

    def encode(self, video: Tensor) -> Any:
        """A clip [1, 3, T, H, W] in [-1, 1] to whatever `decode` takes."""
        ...

    def decode(self, latents: Any) -> Any:
        """All frames of the clip."""
        ...
