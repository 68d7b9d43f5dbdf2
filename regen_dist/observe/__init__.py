"""Watching a run: the metrics record, the progress line, wandb."""
