"""Measures of a reconstruction, the trivial decoders that it is compared with, and the page that shows it."""
