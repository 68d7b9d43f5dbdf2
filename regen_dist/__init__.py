"""Distributed training of REGEN: compact video embeddings with a (re-)generative decoder (arXiv 2503.08665)."""

__version__ = "0.1.0"
