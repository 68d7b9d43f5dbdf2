"""What is known of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.observe.hardware import GPU_PEAKS, has_native_bf16, known_peak


@pytest.mark.parametrize(
    ("line", "does"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu avx512f amx_bf16", True),
        ("Features\t: fp asimd i8mm bf16", True),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_vnni", False),
        ("model name\t: bf16 in its name", False),
    ],
)
def test_bf16_is_read_from_the_flags(tmp_path: Path, line: str, does: bool) -> None:
    """AMX, AVX-512 BF16 and ARM's extension count; a CPU without them takes ten times as long in bf16."""
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{line}\n")
    assert has_native_bf16(path) is does


def test_a_system_that_does_not_tell_is_not_warned_of(tmp_path: Path) -> None:
    """No /proc: nothing is known against it."""
    assert has_native_bf16(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA GB200", "GB200"), ("NVIDIA B200", "B200"),
        ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200 NVL"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"), ("NVIDIA A10", "A10"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "4090"), ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA H20", None), ("NVIDIA RTX A1000", None),
    ],
)  # fmt: skip
def test_a_gpu_has_the_peak_of_its_own_kind(name: str, entry: str | None) -> None:
    """Kinds of one chip differ (an H100 on PCIe has three quarters of one on SXM), and A10 is in A100."""
    assert known_peak(name) is (None if entry is None else GPU_PEAKS[entry])


def test_every_peak_has_its_source_and_tensor_cores_are_the_faster_ones() -> None:
    for peak in GPU_PEAKS.values():
        assert peak.source
        assert peak.bf16 is None or peak.bf16 > 1.9 * peak.fp32
