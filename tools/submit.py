"""`regen submit`: start a job on a cluster, or on this machine (see `launcher.cli`)."""

import launcher.pipelines.cli  # noqa: F401 - adds its command
from launcher.cli import app

__all__ = ["app"]
