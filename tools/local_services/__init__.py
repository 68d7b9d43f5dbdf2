"""Local servers for tests and experiments: a real Slurm and a real S3 store on loopback."""
