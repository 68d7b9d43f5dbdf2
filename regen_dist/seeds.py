"""The range of seeds: keys of noise and orders, of 64 bits with a sign. Trainings and data take none below 0."""

from __future__ import annotations

from regen_dist.errors import ConfigError

SEED_END = 2**63


def check_seed(seed: int) -> None:
    """Raise ConfigError if a seed is out of the range."""
    if not -SEED_END <= seed < SEED_END:
        raise ConfigError(f"seed is {seed}; it must be in -2**63 to 2**63 - 1")
