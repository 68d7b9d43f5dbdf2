"""What a codec costs is counted without running it, as it is run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.config.embedder import ModelConfig
from regen_dist.errors import ConfigError, DataError
from regen_dist.models.flops import count_flops
from tests.helpers.tiny import clips, tiny_model, tiny_run
from tools.bench.codec_systems import (
    CONFIGS,
    REFERENCES,
    ClipSize,
    OwnCoder,
    chosen_systems,
    count_other,
    count_own,
    own_config,
    parse_size,
    systems,
)

TARGET = ClipSize(17, 256, 256)


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
@pytest.mark.parametrize("frames", [1, 3, 5, 9, 11])
def test_the_count_is_that_of_a_run(kind: str, frames: int) -> None:
    """Of an image, of a clip that is filled up, of one window and of several that share frames. The kernel is one whose
    operations torch counts on a CPU, too."""
    size = ClipSize(frames, 32, 48)
    model = tiny_model(kind=kind, decoder__attention={"backend": "eager"})
    config = tiny_run(model=model.model_dump(mode="json"))
    coder, counted = OwnCoder(config), count_own(config.model, size)
    with FlopCounterMode(display=False) as encoding:
        latents = coder.encode(clips(1, *size))
    with FlopCounterMode(display=False) as decoding:
        done = coder.decode(latents)
    assert [frame.shape for frame in done] == [(32, 48, 3)] * frames
    assert (counted.encode_flops, counted.decode_flops) == (encoding.get_total_flops(), decoding.get_total_flops())


@pytest.mark.parametrize("k", [4, 8, 32])
def test_the_fast_preset_keeps_to_its_budget(k: int) -> None:
    """A step of a video of 17x256x256 at most 3 TFLOP, all its windows together. (k = 16 decodes what 32 does.)"""
    counted = count_own(_model(REFERENCES[k]), TARGET)
    assert counted.decode_flops <= 3e12
    assert counted.latents == ((max(16 // k, 1), 8, 32, 32),) * 2


def test_one_window_is_what_describe_says() -> None:
    model = tiny_model(decoder__attention={"pattern": "window", "window": [5, 2, 2]})
    size = ClipSize(5, 32, 48)
    described, counted = count_flops(model, (32, 48)), count_own(model, size)
    assert counted.encode_flops == described.forward_flops["encoder"]
    assert counted.decode_flops == described.num_forward_flops - described.forward_flops["encoder"]
    assert counted.parameters == described.num_parameters
    assert counted.facts(size)["bits_per_pixel"] == described.bits_per_pixel


def test_16_and_32_have_one_decoder() -> None:
    """Of 17 frames; so what holds the one to its budget holds the other."""
    assert _model("fast_k16").decoder == _model("fast_k32").decoder
    assert _model("fast_k16").conditioning == _model("fast_k32").conditioning


def _model(name: str) -> ModelConfig:
    return own_config(CONFIGS / f"{name}.yaml", "fp32").model


class Halving:
    """A codec of another package: a convolution that halves the sides, and one that doubles them."""

    def __init__(self) -> None:
        self.model = torch.nn.ModuleList(
            [torch.nn.Conv3d(3, 4, 1, (1, 2, 2)), torch.nn.ConvTranspose3d(4, 3, (1, 2, 2), (1, 2, 2))]
        )

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return self.model[0](video)  # type: ignore[no-any-return]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.model[1](latents)  # type: ignore[no-any-return]

    def bits(self, latents: torch.Tensor) -> int:
        return 10 * latents.numel()


def test_codecs_of_other_packages_are_counted_without_storage() -> None:
    """Also at a size that no memory holds."""
    size = ClipSize(100_000, 2048, 2048)
    counted = count_other(Halving, size)
    cells = 100_000 * 1024 * 1024
    assert counted.encode_flops == 2 * cells * 3 * 4
    assert counted.decode_flops == 2 * cells * 3 * 4 * 4
    assert (counted.parameters, counted.latents) == (12 + 4 + 48 + 3, ((1, 4, 100_000, 1024, 1024),))
    assert counted.facts(size)["bits_per_pixel"] == 10


class Losing(Halving):
    """Gives a frame less than it was given."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents)[:, :, 1:]


def test_a_codec_that_gives_other_frames_is_no_codec_of_that_size() -> None:
    with pytest.raises(DataError, match="gives 5 frames of a clip of 6"):
        count_other(Losing, ClipSize(6, 16, 16))


def test_systems_by_name() -> None:
    found = [system.name for system in systems()]
    assert len(set(found)) == len(found)
    assert {"fast_k4", "regen_k32", "nano", "AutoencoderKLCosmos 4x", "magvit2-pytorch"} <= set(found)
    assert [system.name for system in chosen_systems("Cosmos")] == ["AutoencoderKLCosmos 4x", "AutoencoderKLCosmos 8x"]
    assert {system.name: system.temporal_compression for system in chosen_systems("_k")}["fast_k16"] == 16


@pytest.mark.parametrize(("pattern", "message"), [("(", "no regular expression"), ("nothing", "finds none of fast_k4")])
def test_patterns_that_find_nothing(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen_systems(pattern)


def test_sizes() -> None:
    assert parse_size("17x64x96") == ClipSize(17, 64, 96)
    assert str(parse_size("17x64x96")) == "17x64x96"
    for text in ("17x64", "17x64x0", "17 x 64 x 64", "0x64x64", "17x64x64x3", ""):
        with pytest.raises(ConfigError, match="FRAMESxHEIGHTxWIDTH"):
            parse_size(text)
