"""Checkpoints: sharded, elastic, committed atomically."""
