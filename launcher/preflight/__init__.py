"""Preflight checks before a job is submitted; all problems are reported at once. Imports no torch."""

from launcher.preflight.report import Report, check

__all__ = ["Report", "check"]
