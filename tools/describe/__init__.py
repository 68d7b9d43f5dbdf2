"""`regen describe`: shapes, sizes and costs of a config, without its weights in memory."""

from __future__ import annotations

from tools.describe.command import describe
from tools.describe.facts import gather

__all__ = ["describe", "gather"]
