"""`regen submit`: start a job on a cluster, or on this machine (see `launcher.cli`)."""

from launcher.cli import app

__all__ = ["app"]
