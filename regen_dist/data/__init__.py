"""Datasets of WebDataset tars with an index.

What they are (`dataset`), where they lie (`objects`), making them (`making`), looking at them (`inspection`), in which
order a run sees them (`order`), and how they become clips (`reading`, `video`).
"""
