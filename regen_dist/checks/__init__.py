"""Validation of a config before anything runs: everything that `regen train` would refuse at its start."""
