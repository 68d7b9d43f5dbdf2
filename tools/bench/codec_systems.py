"""The package magvit2-pytorch at 32-fold temporal compression, with random weights.

It imports torchvision for the weights of a perceptual loss, and a trainer, which imports more. Neither is needed to
encode and decode, and torchvision's builds on PyPI do not import beside a CPU build of torch: where one of them is
missing, a name without content stands in for it.
"""

from __future__ import annotations

import enum
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from regen_dist.config.embedder import ModelConfig, RunConfig
from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.errors import ConfigError, DataError
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import Frame
from regen_dist.inference.long_video import DecodePlan, decode_stream, make_plan
from regen_dist.inference.windows import Window, blend_weights
from regen_dist.models.building import build_model
from regen_dist.models.embedder import Baseline, Regen
from regen_dist.models.encoder import Latents

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


# The video codecs of diffusers, by their default configs, with random weights: this is about cost.

_BITS = 16  # of a latent's value


class DiffusersCoder:
    """A variational autoencoder of diffusers; the mean of the latents is what is kept.

    Args:
        name: its class.
        options: beside the defaults.

    Raises:
        ImportError: diffusers is not installed.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.model = getattr(import_module("diffusers"), name)(**options).eval()

    def encode(self, video: Tensor) -> Tensor:
        """[1, 3, T, H, W] to [1, C, t, h, w]."""
        mean: Tensor = self.model.encode(video).latent_dist.mode()
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """[1, C, t, h, w] to [1, 3, T, H, W]."""
        video: Tensor = self.model.decode(latents).sample
        return video

    def bits(self, latents: Tensor) -> int:
        """Of what is kept."""
        return _BITS * latents.numel()


def diffusers_coder(name: str, **options: Any) -> Callable[[], DiffusersCoder]:
    """Makes the codec when it is called."""
    return lambda: DiffusersCoder(name, **options)


# Sizes of clips, and what is said of a codec at one of them.


class ClipSize(NamedTuple):
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


def parse_size(text: str) -> ClipSize:
    """FRAMESxHEIGHTxWIDTH, as in 17x64x64.

    Raises:
        ConfigError: it is something else.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ConfigError(f"the size {text!r} is none: give FRAMESxHEIGHTxWIDTH, as in 17x64x64")
    return ClipSize(*map(int, found.groups()))


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

    def facts(self, size: ClipSize) -> dict[str, Any]:
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


# This project's codecs as they are used: a clip of any length is cut into windows that share a frame.


class OwnCoder:
    """An embedder of this project, one sampling step; decodes as `regen reconstruct` does, to frames of eight bits."""

    def __init__(self, config: RunConfig) -> None:
        self._codec = Codec(build_model(config.model), config, torch.device("cpu"))

    def encode(self, video: Tensor) -> tuple[list[Window], tuple[int, int, int]]:
        """The windows of a clip, a group of them at a time, and the clip's size."""
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
        """Group by group, neighbours blended."""
        windows, (frames, *sides) = latents
        plan = make_plan(frames, self._codec.num_frames)
        groups = ([windows[number] for number in group] for group in plan.groups)
        stream = decode_stream(
            self._codec, groups, plan, [np.arange(float(frames))], sides=(sides[0], sides[1]), steps=1
        )
        return [frame for (finished,) in stream for frame in finished]


def own_config(path: Path, precision: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A config whose data is never looked for."""
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
        given = Counter(_frames_given(plan))
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
    """With the kernel that runs on the meta device; which one it is changes no count."""
    attention = config.decoder.attention.model_copy(update={"backend": "sdpa"})
    return config.model_copy(update={"decoder": config.decoder.model_copy(update={"attention": attention})})


def _frames_given(plan: DecodePlan) -> list[int]:
    """How many frames of the clip each window decodes; neighbours both decode those that they share."""
    times = torch.arange(plan.num_frames, dtype=torch.float64, device="cpu")
    return (blend_weights(plan.starts, plan.clip, times) > 0).sum(1).tolist()


def _decode(model: Regen | Baseline, latents: Latents, frames: int, clip: int) -> int:
    """Operations of one step for so many frames of a clip; the baseline's decoder gives whole clips alone."""
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


# The codecs that are compared, by name; those of this project by the stem of their config.

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

    def count(self, size: ClipSize) -> Counted:
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


def chosen_systems(pattern: str) -> list[System]:
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
