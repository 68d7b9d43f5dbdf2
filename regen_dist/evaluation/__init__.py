"""Measures of a reconstruction, the trivial decoders it is held against, and the page that shows it."""
