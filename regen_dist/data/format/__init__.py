"""Dataset format: index, manifest, shards, and the memory-mapped catalogue."""
