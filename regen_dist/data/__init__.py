"""Datasets of WebDataset tars with an index: making them (`making`), what they are (`dataset`), where they lie (`objects`),
in which order a run sees them (`order`), and how they become clips (`reading`, `video`)."""
