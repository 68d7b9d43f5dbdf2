"""Shards, their index, the order of samples, and the loader that turns them into clips."""
