"""From a dataset to batches of clips: fetching ahead, caching, decoding, stand-ins."""
