"""`regen gpu-check`: correctness and speed of a GPU machine, part by part."""

from __future__ import annotations

from tools.gpu_check.command import gpu_check

__all__ = ["gpu_check"]
