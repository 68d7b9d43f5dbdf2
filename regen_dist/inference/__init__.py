"""Encoding and decoding of videos of any length, any sides and any frame rate."""
