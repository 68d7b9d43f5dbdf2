"""Datasets of WebDataset tars with an index: `format`, `storage`, `build`, `inspect`, data `order`, `loading`,
`video`."""
