"""Codecs of `regen bench codec`: this project's, those of diffusers, and magvit2-pytorch, with random weights.

magvit2-pytorch imports torchvision for a perceptual loss and for a trainer with further imports. Neither is needed to
encode and decode, and torchvision's builds on PyPI cannot be imported beside a CPU build of torch: a missing one is
replaced by an empty module.
"""

from __future__ import annotations

import enum
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.config import load_embedder_config
from regen_dist.config.embedder import EmbedderConfig, ModelConfig
from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.errors import ConfigError, DataError
from regen_dist.inference.codec import Codec, Window, blend_weights
from regen_dist.inference.frames import Frame
from regen_dist.inference.long_video import decode_stream, make_plan
from regen_dist.models.embedder import Baseline, Regen, build_model
from regen_dist.models.encoder import Latents

CODE_BITS = 18  # of a token: the paper's codebook (Yu et al., 2024) of 2**18 words
# The package's own example, with enough temporal downsampling for k = 32.
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
            image_size=256,  # used only in its `forward`
            init_dim=64,
            layers=_LAYERS,
            max_dim=_WIDEST,
            codebook_size=2**CODE_BITS,
            use_gan=False,
            perceptual_loss_weight=0.0,
            flash_attn=False,
        ).eval()

    def encode(self, video: Tensor) -> Tensor:
        """Encode [1, 3, T, H, W] to the quantised [1, C, t, h, w]."""
        quantized: Tensor = self.model.encode(video, quantize=True)[0]
        return quantized

    def decode(self, latents: Tensor) -> Tensor:
        """Decode [1, C, t, h, w] to [1, 3, T, H, W]."""
        frames: Tensor = self.model.decode(latents)
        return frames

    def bits(self, latents: Tensor) -> int:
        """Return the bits of the tokens."""
        return CODE_BITS * torch.Size((latents.shape[0], *latents.shape[2:])).numel()


def _tokenizer() -> Any:
    for name, content in _replacement_modules().items():
        try:
            import_module(name)
        except (ImportError, RuntimeError):  # RuntimeError: torchvision's operators do not match torch
            sys.modules[name] = content
    return import_module("magvit2_pytorch.magvit2_pytorch").VideoTokenizer


def _replacement_modules() -> dict[str, ModuleType]:
    """Return empty modules for imports of the package that the tokenizer does not need."""
    models, vision, trainer = map(ModuleType, ("torchvision.models", "torchvision", "magvit2_pytorch.trainer"))
    weights = enum.Enum("VGG16_Weights", "DEFAULT", module="torchvision.models")  # type: ignore[misc]
    setattr(models, "VGG16_Weights", weights)  # noqa: B010 - a module's attribute that no type knows
    setattr(vision, "models", models)  # noqa: B010
    setattr(trainer, "VideoTokenizerTrainer", None)  # noqa: B010
    return {each.__name__: each for each in (vision, models, trainer)}


# Video codecs of diffusers with their default configs and random weights: only the cost is measured.

_BITS = 16  # of a latent's value


class DiffusersCoder:
    """A variational autoencoder of diffusers; the mean of the latents is what is kept.

    Args:
        name: its class.
        options: settings that differ from the defaults.

    Raises:
        ImportError: diffusers is not installed.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.model = getattr(import_module("diffusers"), name)(**options).eval()

    def encode(self, video: Tensor) -> Tensor:
        """Encode [1, 3, T, H, W] to [1, C, t, h, w]."""
        mean: Tensor = self.model.encode(video).latent_dist.mode()
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """Decode [1, C, t, h, w] to [1, 3, T, H, W]."""
        video: Tensor = self.model.decode(latents).sample
        return video

    def bits(self, latents: Tensor) -> int:
        """Return the bits of the latents."""
        return _BITS * latents.numel()


# Clip sizes, and the counted operations of a codec at a size.


class ClipSize(NamedTuple):
    """Frames and sides of a clip."""

    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Pixels of all frames."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def parse_size(text: str) -> ClipSize:
    """Parse FRAMESxHEIGHTxWIDTH, such as 17x64x64.

    Raises:
        ConfigError: it is malformed.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ConfigError(f"the size {text!r} is none: give FRAMESxHEIGHTxWIDTH, as in 17x64x64")
    return ClipSize(*map(int, found.groups()))


@dataclass(frozen=True)
class Counted:
    """Counts of a codec, determined without running it.

    Attributes:
        parameters: parameters of encoder and decoder.
        encode_flops, decode_flops: operations per clip, with one decoder step; a multiply-add counts as two.
        latents: shapes of the latents.
        latent_bits: bits of the latents: 16 per real number, or those of the tokens.
    """

    parameters: int
    encode_flops: int
    decode_flops: int
    latents: tuple[tuple[int, ...], ...]
    latent_bits: int

    def facts(self, size: ClipSize) -> dict[str, Any]:
        """Return the counts as plain values."""
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
        """Encode a clip [1, 3, T, H, W] in [-1, 1] to the input of `decode`."""
        ...

    def decode(self, latents: Any) -> Any:
        """Return all frames of the clip."""
        ...


# This project's codecs as they are used: a clip of any length is cut into windows that share a frame.


class OwnCoder:
    """An embedder of this project, one sampling step; decodes as `regen reconstruct` does, to frames of eight bits."""

    def __init__(self, config: EmbedderConfig) -> None:
        self._codec = Codec(build_model(config.model), config, torch.device("cpu"))

    def encode(self, video: Tensor) -> tuple[list[Window], tuple[int, int, int]]:
        """Return the windows of a clip, encoded in groups, and the clip's size."""
        frames, height, width = video.shape[2:]
        plan = make_plan(frames, self._codec.num_frames)
        windows: list[Window] = []
        for group in plan.groups:
            starts = [plan.starts[number] for number in group]
            clips = [_filled(video[:, :, start : start + plan.clip], plan.clip) for start in starts]
            latents = self._codec.encode(torch.cat(clips))
            own = (Latents(*(part[place, None] for part in latents)) for place in range(len(starts)))
            windows += [Window(each, float(start), plan.clip) for each, start in zip(own, starts, strict=True)]
        return windows, (frames, height, width)

    def decode(self, latents: tuple[list[Window], tuple[int, int, int]]) -> list[Frame]:
        """Decode group by group and blend neighbours."""
        windows, (frames, *sides) = latents
        plan = make_plan(frames, self._codec.num_frames)
        groups = ([windows[number] for number in group] for group in plan.groups)
        stream = decode_stream(
            self._codec, groups, plan, [np.arange(float(frames))], sides=(sides[0], sides[1]), steps=1
        )
        return [frame for (finished,) in stream for frame in finished]


def own_config(path: Path, precision: str, overrides: Sequence[str] = ()) -> EmbedderConfig:
    """Return a config whose data is never opened."""
    own = ["data.url=nowhere", "data.validation_url=null", f"engine.precision={precision}", *overrides]
    return load_embedder_config(path, own)


def count_own(config: ModelConfig, size: ClipSize) -> Counted:
    """Count a codec of this project on the meta device: each window once, and of it the frames that it gives."""
    height, width = size.height, size.width
    plan = make_plan(size.frames, config.num_frames)
    with torch.device("meta"):
        model = build_model(_on_meta(config)).eval()
        clip = torch.empty(1, 3, plan.clip, height, width)
        with torch.no_grad(), FlopCounterMode(display=False) as encoding:
            latents = model.encode(clip)
        times = torch.arange(plan.num_frames, dtype=torch.float64, device="cpu")
        blended = blend_weights(plan.starts, plan.clip, times) > 0  # neighbours both decode shared frames
        given = Counter(blended.sum(1).tolist())
        decode_flops = sum(count * _decode(model, latents, frames, plan.clip) for frames, count in given.items())
    windows = len(plan.starts)
    kept = tuple((windows, *part.shape[1:]) for part in (latents if plan.clip > 1 else latents[:1]))
    return Counted(
        parameters=sum(each.numel() for each in model.parameters()),
        encode_flops=windows * encoding.get_total_flops(),
        decode_flops=decode_flops,
        latents=kept,
        latent_bits=_BITS * sum(torch.Size(shape).numel() for shape in kept),
    )


def _on_meta(config: ModelConfig) -> ModelConfig:
    """Return the config with an attention backend that runs on the meta device; it does not affect the counts."""
    attention = config.decoder.attention.model_copy(update={"backend": "sdpa"})
    return config.model_copy(update={"decoder": config.decoder.model_copy(update={"attention": attention})})


def _decode(model: Regen | Baseline, latents: Latents, frames: int, clip: int) -> int:
    """Return the FLOPs of one step for this many frames; the baseline's decoder decodes whole clips only."""
    height, width = (SPATIAL_COMPRESSION * side for side in latents.content.shape[-2:])
    noisy, times = torch.empty(1, 3, frames, height, width), torch.empty(1, frames)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if isinstance(model, Baseline):
            model.reconstruct(latents, clip)
        else:
            model.denoise(noisy, torch.ones(1), latents, times)
    return int(counter.get_total_flops())


def _filled(clip: Tensor, length: int) -> Tensor:
    """A clip that is too short, filled up with its last frame."""
    missing = length - clip.shape[2]
    return torch.cat([clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2) if missing else clip


# The compared codecs by name; this project's by the stem of their config.

CONFIGS = Path("configs/embedder")
REFERENCES = {4: "fast_k4", 8: "fast_k8", 16: "fast_k16", 32: "fast_k32"}  # ours, by temporal compression
_OWN = (*REFERENCES.values(), *(f"regen_k{k}" for k in REFERENCES), "nano")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class System:
    """A codec that can be compared.

    Attributes:
        name: model of this project: the stem of a config in `CONFIGS`.
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
        """True if it is this project's codec."""
        return self.build is None

    def coder(self, precision: str) -> Coder:
        """Return the codec with random weights. Raises ImportError if its package is not installed."""
        if self.build is None:
            return OwnCoder(own_config(CONFIGS / f"{self.name}.yaml", precision))
        coder = self.build()
        coder.model.to(DTYPES[precision])
        return coder  # type: ignore[no-any-return]

    def count(self, size: ClipSize) -> Counted:
        """Return its shapes and operations. Raises the codec's own error at a size that it does not support."""
        if self.build is None:
            return count_own(own_config(CONFIGS / f"{self.name}.yaml", "fp32").model, size)
        return count_other(self.build, size)


def systems() -> list[System]:
    """Return all codecs, this project's first."""
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
        found.append(System(called, k, partial(DiffusersCoder, name, **options), "diffusers"))
    return [*found, System("magvit2-pytorch", 32, Magvit2Coder, "magvit2-pytorch")]


def chosen_systems(pattern: str) -> list[System]:
    """Return the codecs whose names match a regular expression.

    Raises:
        ConfigError: the expression is invalid or matches none.
    """
    try:
        found = [system for system in systems() if re.search(pattern, system.name)]
    except re.error as error:
        raise ConfigError(f"--systems {pattern!r} is no regular expression: {error}; give another") from error
    if not found:
        raise ConfigError(f"--systems {pattern!r} finds none of {', '.join(each.name for each in systems())}")
    return found


def named_system(name: str) -> System:
    """One of them."""
    return next(system for system in systems() if system.name == name)


def count_other(build: Callable[[], Any], size: ClipSize) -> Counted:
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
    """Check that a codec returns as many frames as it was given.

    Args:
        decoded: [1, 3, T, H, W], or a list of frames.
        frames: number of frames of the input.

    Raises:
        DataError: the number differs.
    """
    found = decoded.shape[2] if isinstance(decoded, torch.Tensor) else len(decoded)
    if found != frames:
        raise DataError(f"gives {found} frames of a clip of {frames}")
