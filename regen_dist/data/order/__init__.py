"""Data order: pure functions of the seed, the step and the sizes of the data."""
