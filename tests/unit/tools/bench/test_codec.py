"""`regen bench codec`: costs counted without running, and tables that invent nothing and name failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.config.embedder import ModelConfig
from regen_dist.errors import ConfigError, DataError
from regen_dist.models.flops import count_flops
from tests.helpers.tiny import clips, tiny_model, tiny_run
from tools.bench.codec import codec_figures, summary, table, targets
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
@pytest.mark.parametrize("frames", [1, 3, 5, 11])
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


# From what processes told to the table: nothing is made up, what went wrong is said.


def _call(seconds: float, peak: int = 100) -> dict[str, Any]:
    return {"wall_s": 2 * seconds, "cpu_s": seconds, "peak_bytes": peak}


def _row(name: str, k: int, size: list[int], **facts: Any) -> dict[str, Any]:
    own = name.startswith(("fast", "regen", "nano"))
    return {"system": name, "own": own, "temporal_compression": k, "size": size, **facts}


def _measured(seconds: float, peak: int) -> dict[str, Any]:
    spread = {"median": seconds, "min": seconds, "max": seconds}
    call = {"wall_s": spread, "cpu_s": spread, "peak_bytes": peak, "passes": 1}
    return {"encode": call, "decode": call}


def test_the_first_pass_counts_for_memory_alone() -> None:
    told = [
        {"built_s": 1.0, "base_bytes": 7},
        {"encode": _call(9.0, 500), "number": 0},
        {"decode": _call(8.0), "number": 0},
        {"encode": _call(1.0), "number": 1},
        {"decode": _call(2.0), "number": 1},
        {"encode": _call(3.0), "number": 2},
    ]
    found = summary(told)
    assert found["encode"]["cpu_s"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert (found["encode"]["peak_bytes"], found["encode"]["passes"]) == (500, 2)
    assert found["decode"]["wall_s"]["median"] == 4.0
    assert found["base_bytes"] == 7
    assert "problem" not in found


def test_a_process_that_was_ended_leaves_what_it_told() -> None:
    """Its only pass counts then, and what it did not come to is not there."""
    found = summary([{"encode": _call(9.0), "number": 0}, {"problem": "past the limit of 5 s"}])
    assert found["encode"]["cpu_s"]["median"] == 9.0
    assert found["encode"]["peak_bytes"] == 100
    assert found["problem"] == "past the limit of 5 s"
    assert "decode" not in found


SMALL, LARGE = [17, 64, 64], [17, 256, 256]
ROWS = [
    _row("fast_k8", 8, SMALL, encode_flops=10, decode_flops=int(2e12), latents=[[2, 8, 8, 8]] * 2,
         parameters=10_000_000, bits_per_pixel=0.5, **_measured(2.0, 10_000_000)),
    _row("AutoencoderKLCosmos 8x", 8, SMALL, encode_flops=20, decode_flops=int(1e12), latents=[[1, 16, 3, 8, 8]],
         parameters=30_000_000, bits_per_pixel=0.7, **_measured(1.0, 40_000_000)),
    _row("magvit2-pytorch", 32, SMALL, not_counted="not installed: magvit2-pytorch (x | y)", problem="not installed"),
    _row("fast_k8", 8, LARGE, encode_flops=10, decode_flops=int(2.5e12)),
    _row("fast_k16", 16, LARGE, encode_flops=10, decode_flops=int(3.5e12)),
    _row("fast_k8", 8, [33, 64, 64], **_measured(6.0, 15_000_000)),
]  # fmt: skip


def test_targets_missed_are_said_to_be_missed() -> None:
    found = {what: (figure, most) for what, figure, most in targets(ROWS)}
    assert found == {
        "fast_k8: TFLOP of a decoder step at 17x256x256": (2.5, 3.0),
        "fast_k16: TFLOP of a decoder step at 17x256x256": (3.5, 3.0),
        "fast_k8: FLOP of the encoder at 17x64x64, of those of AutoencoderKLCosmos 8x": (0.5, 1.0),
        "fast_k8: CPU seconds of the encoder at 17x64x64, of those of AutoencoderKLCosmos 8x": (2.0, 1.0),
    }
    lines = table({"rows": ROWS}).splitlines()
    assert "| fast_k8: TFLOP of a decoder step at 17x256x256 | 2.50 | ≤ 3 | yes |" in lines
    assert "| fast_k16: TFLOP of a decoder step at 17x256x256 | 3.50 | ≤ 3 | **no** |" in lines


def test_figures_stand_beside_those_of_ours_at_the_same_compression() -> None:
    lines = {
        line.split(" | ")[0]: line for line in table({"rows": ROWS}).splitlines() if "| 8x8" in line or "16x3" in line
    }
    assert lines["| AutoencoderKLCosmos 8x"] == (
        "| AutoencoderKLCosmos 8x | 8 | 1x16x3x8x8 | 0.7 | 30.0 M (3×) | 2e-11 T (2×) | 1 T (0.5×) | 1.00 (0.5×) | "
        "1.00 (0.5×) | 40 MB (4×) | 40 MB (4×) |  |"
    )


def test_what_was_not_had_is_told_with_the_reason() -> None:
    text = table({"rows": ROWS})
    assert "| magvit2-pytorch | 32 | – |  | – | – | – | – | – | – | – | not installed |" in text
    assert "**17 frames of 256x256** (counted, not run)" in text
    lines = [line for line in text.splitlines() if line.startswith("| fast_k16 ")]
    assert lines == ["| fast_k16 | 16 | – |  | – | 1e-11 T | 3.5 T | – | – | – | – |  |"]


def test_every_line_of_a_table_has_its_cells() -> None:
    for part in table({"rows": ROWS}).split("\n\n"):
        assert len({line.count("|") for line in part.splitlines() if line.startswith("|")}) <= 1


def test_how_it_grows() -> None:
    assert "| fast_k8 | 17x64x64 | 33x64x64 | 1.94× | 3.00× | 3.00× | 1.50× | 1.50× |" in table({"rows": ROWS})


def test_the_figures_that_are_compared_from_run_to_run() -> None:
    assert {figure.name: figure.value for figure in codec_figures({"rows": ROWS})} == {
        "fast_k8 17x64x64 encode_cpu_s": 2.0,
        "fast_k8 17x64x64 decode_cpu_s": 2.0,
        "fast_k8 33x64x64 encode_cpu_s": 6.0,
        "fast_k8 33x64x64 decode_cpu_s": 6.0,
    }
