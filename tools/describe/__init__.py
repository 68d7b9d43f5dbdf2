"""`regen describe`: what a config builds and what it costs, without building it."""

from __future__ import annotations

from tools.describe.command import describe
from tools.describe.facts import gather

__all__ = ["describe", "gather"]
