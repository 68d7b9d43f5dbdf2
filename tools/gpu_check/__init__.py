"""`regen gpu-check`: what a machine with a GPU computes right, and how fast, part by part."""

from __future__ import annotations

from tools.gpu_check.command import gpu_check

__all__ = ["gpu_check"]
