"""The library's own validation of a config before anything runs: what `regen train` would refuse at its start."""
