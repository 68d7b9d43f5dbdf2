"""Synthetic videos of moving shapes, with captions that are correct by construction."""
