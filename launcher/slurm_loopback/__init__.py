"""A real Slurm cluster on this machine, for tests, demonstrations and tries: several nodes, all on loopback.

`start_slurm` runs it for the length of a `with` block, `python -m launcher.slurm_loopback FOLDER` until Ctrl-C. It
needs Debian's packages of Slurm, and neither systemd nor root.
"""

from launcher.slurm_loopback.cluster import SlurmCluster, start_slurm
from launcher.slurm_loopback.daemons import missing_packages

__all__ = ["SlurmCluster", "missing_packages", "start_slurm"]
