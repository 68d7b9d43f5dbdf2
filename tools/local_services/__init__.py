"""Servers for tests and tries on this machine: a real Slurm and a real S3 store on loopback."""
