"""From what processes told to the table: nothing is made up, what went wrong is said."""

from __future__ import annotations

from typing import Any

from tools.bench.codec import figures, summary, table, targets


def _call(seconds: float, peak: int | None = 100) -> dict[str, Any]:
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
    found = summary([{"encode": _call(9.0, None), "number": 0}, {"problem": "past the limit of 5 s"}])
    assert found["encode"]["cpu_s"]["median"] == 9.0
    assert found["encode"]["peak_bytes"] is None
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
    assert figures({"rows": ROWS}) == {
        "fast_k8 17x64x64 encode_cpu_s": 2.0,
        "fast_k8 17x64x64 decode_cpu_s": 2.0,
        "fast_k8 33x64x64 encode_cpu_s": 6.0,
        "fast_k8 33x64x64 decode_cpu_s": 6.0,
    }
