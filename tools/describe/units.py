"""Numbers as text."""

from __future__ import annotations


def flops_text(count: int) -> str:
    """A multiplication with an addition counts as two."""
    return scaled(count, 1000, (" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP"))


def bytes_text(count: int) -> str:
    """Memory is counted in powers of 1024."""
    return scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def decimal_bytes(count: int) -> str:
    """Traffic is counted in powers of 1000, as bandwidths are."""
    return scaled(count, 1000, (" B", " kB", " MB", " GB", " TB"))


def scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    """Three or so significant digits with the largest unit that keeps the number at 1 or above."""
    power = 0
    while count >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    return f"{count:.0f}{units[0]}" if power == 0 else f"{count:.2f}{units[power]}"
