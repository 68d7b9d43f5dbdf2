"""Pipelines: jobs that depend on each other, from one file under `configs/pipelines/`."""
