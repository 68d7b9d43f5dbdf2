"""What `regen bench step` measures: how much of the machine a training step uses, and where the rest goes."""
