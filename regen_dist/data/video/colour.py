"""Colours of high dynamic range and wide primaries as BT.709 of standard range: formulas, and the table made of them.

- Light of a PQ signal (SMPTE ST 2084; BT.2100, table 4) is in cd/m². Light of an HLG signal follows from BT.2100, table
  5: inverse OETF, then the OOTF of a display of 1000 cd/m², whose gamma is 1.2.
- It is tone-mapped by the curve of BT.2390, section 5.4.1 (a knee in PQ, then a Hermite spline), from 1000 to 100
  cd/m². The largest of red, green and blue goes through the curve, the others keep their ratio to it. Brighter than
  1000 cd/m² is white, whatever the mastering display says: equal signals give equal pixels.
- Colours outside BT.709 are mixed with grey of their own luminance until they are inside.
- The result is encoded for the display of BT.1886 (gamma 2.4, black 0).

So a grey of 49 cd/m², which is 190 of 255 in BT.709, stays near 190; the reference white of BT.2408 (203 cd/m²) becomes
242. Video of standard range with wide primaries keeps its greys.
"""

from __future__ import annotations

import functools
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

PEAK, WHITE = 1000.0, 100.0  # cd/m²: of the light that is kept, and of the result
DISPLAY_GAMMA = 2.4  # BT.1886


class Primaries(IntEnum):
    """Colour primaries by their numbers in H.273, which FFmpeg uses too."""

    BT709 = 1
    BT2020 = 9
    SMPTE431 = 11
    SMPTE432 = 12


class Transfer(IntEnum):
    """Transfer characteristics by their numbers in H.273, which FFmpeg uses too."""

    BT709 = 1
    IEC61966_2_1 = 13
    SMPTE2084 = 16
    ARIB_STD_B67 = 18


HDR: dict[int, str] = {Transfer.SMPTE2084: "PQ", Transfer.ARIB_STD_B67: "HLG"}
WIDE: dict[int, str] = {
    Primaries.BT2020: "BT.2020",
    Primaries.SMPTE431: "DCI-P3",
    Primaries.SMPTE432: "Display P3",
}

_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128  # BT.2100, table 4
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073  # BT.2100, table 5
_OOTF_GAMMA = 1.2
_D65 = (0.3127, 0.3290)
_CHROMATICITIES: dict[
    int, tuple[tuple[float, float], ...]
] = {  # of red, green, blue, white (H.273, table 2); the white of DCI-P3 is adapted to D65 by scaling XYZ
    Primaries.BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65),
    Primaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    Primaries.SMPTE431: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    Primaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
}


def pq_light(signal: Floats) -> Floats:
    """Light in cd/m² of a PQ signal in [0, 1]: the EOTF of ST 2084."""
    power = np.clip(signal, 0, 1) ** (1 / _M2)
    light: Floats = 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)
    return light


def pq_signal(light: Floats) -> Floats:
    """PQ signal in [0, 1] of light in cd/m²: the inverse EOTF of ST 2084."""
    power = (np.clip(light, 0, 10_000) / 10_000) ** _M1
    signal: Floats = ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
    return signal


def hlg_light(signal: Floats) -> Floats:
    """Light in cd/m² on a display of 1000 cd/m² of an HLG signal in [0, 1], BT.2020 RGB on the last axis."""
    signal = np.clip(signal, 0, 1)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - _C) / _A) + _B) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    # Not channel by channel, as zscale does it, which keeps greys and makes colours too strong or too weak.
    light: Floats = PEAK * luminance[..., None] ** (_OOTF_GAMMA - 1) * scene
    return light


def tone_curve(light: Floats) -> Floats:
    """Light in cd/m² from [0, PEAK] to [0, WHITE]: BT.2390's EETF for black at 0. Rises, and keeps what is dark."""
    peak = float(pq_signal(np.array(PEAK)))
    largest = float(pq_signal(np.array(WHITE))) / peak
    knee = 1.5 * largest - 0.5
    signal = np.minimum(pq_signal(light) / peak, 1.0)
    t = (np.maximum(signal, knee) - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * largest
    return pq_light(np.where(signal < knee, signal, spline) * peak)


def to_bt709(primaries: int) -> Floats:
    """Matrix [3, 3] from linear RGB of these primaries (a number of H.273) to linear RGB of BT.709."""
    matrix: Floats = np.linalg.inv(_to_xyz(Primaries.BT709)) @ _to_xyz(primaries)
    return matrix


def _to_xyz(primaries: int) -> Floats:
    *colours, white = _CHROMATICITIES[primaries]
    xyz = np.array([(x / y, 1.0, (1 - x - y) / y) for x, y in colours]).T
    own_white, d65 = (np.array((x / y, 1.0, (1 - x - y) / y)) for x, y in (white, _D65))
    matrix: Floats = xyz * np.linalg.solve(xyz, own_white)
    return np.diag(d65 / own_white) @ matrix


def to_standard(signal: Floats, transfer: int, primaries: int) -> Floats:
    """A signal of full-range R'G'B' as BT.709 of standard range.

    Args:
        signal: [..., 3] in [0, 1].
        transfer, primaries: the signal's, as numbers of H.273.

    Returns:
        R'G'B' [..., 3] in [0, 1].
    """
    if transfer in HDR:
        light = pq_light(signal) if HDR[transfer] == "PQ" else hlg_light(signal)
        brightest = light.max(axis=-1, keepdims=True)
        light = light * (tone_curve(brightest) / np.maximum(brightest, 1e-9)) / WHITE
    else:
        light = signal**DISPLAY_GAMMA
    if primaries in WIDE:
        light = _into_gamut(light @ to_bt709(primaries).T)
    standard: Floats = np.clip(light, 0, 1) ** (1 / DISPLAY_GAMMA)
    return standard


def _into_gamut(light: Floats) -> Floats:
    """Mix with grey of the same luminance just as much as brings every channel into [0, 1]."""
    grey = np.clip(light @ np.array([0.2126, 0.7152, 0.0722]), 0, 1)[..., None]
    away = light - grey
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.where(away > 0, (1 - grey) / away, np.where(away < 0, -grey / away, np.inf))
    inside: Floats = grey + away * np.minimum(room.min(axis=-1, keepdims=True), 1)
    return inside


@functools.cache
def cube(transfer: int, primaries: int, side: int = 33) -> str:
    """`to_standard` as a table in the .cube format, which ffmpeg's filter lut3d reads: `side` steps a channel, red
    fastest."""
    steps = np.linspace(0, 1, side)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")
    table = to_standard(np.stack([red, green, blue], axis=-1).reshape(-1, 3), transfer, primaries)
    return f"LUT_3D_SIZE {side}\n" + "\n".join(" ".join(f"{value:.6f}" for value in row) for row in table) + "\n"
