"""`regen jobs`: jobs that `regen submit` has started (see `launcher.jobs`)."""

from launcher.jobs.cli import app

__all__ = ["app"]
