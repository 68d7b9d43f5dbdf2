"""The figures that a bench declares of its record, so that two records can be compared: each with the direction that is
better, and how far it moves by itself."""

from __future__ import annotations

from typing import NamedTuple

NOISE = 0.1  # of a figure that nothing more is known of: machines are shared


class Figure(NamedTuple):
    """One number of a record.

    Attributes:
        name: within its bench; the same in every record.
        value: of this record.
        higher_is_better: of speeds it is, of times and bytes not.
        noise: the share by which it differs between two runs of the same code.
    """

    name: str
    value: float
    higher_is_better: bool
    noise: float = NOISE
