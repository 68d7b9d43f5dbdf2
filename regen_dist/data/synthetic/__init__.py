"""Drawn videos of moving shapes, with captions that are true by construction."""
