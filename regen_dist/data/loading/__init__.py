"""Data loading: prefetching, caching, decoding and replacement of bad samples, from datasets to batches."""
