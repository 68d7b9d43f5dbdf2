"""Job launcher for Slurm and this machine. Imports no torch, so that it also starts on a login node."""
