"""Observation of a run: metrics record, progress line, trackers, heartbeats and hang detection."""
