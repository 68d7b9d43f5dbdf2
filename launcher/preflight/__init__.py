"""What is looked at before a job is submitted: everything that is wrong is told at once. Imports no torch."""

from launcher.preflight.report import Report, check

__all__ = ["Report", "check"]
