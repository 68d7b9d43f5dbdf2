"""Looking at a dataset: whether it is whole, what it holds in numbers and pictures."""
