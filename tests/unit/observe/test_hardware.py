"""What is known of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.observe.hardware import has_native_bf16


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
