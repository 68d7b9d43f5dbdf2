"""`regen jobs`: list, follow, stop and resume submitted jobs."""
