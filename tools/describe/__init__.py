"""`regen describe`: shapes, sizes and costs of a config, without building it."""

from __future__ import annotations

from tools.describe.command import describe
from tools.describe.facts import gather

__all__ = ["describe", "gather"]
