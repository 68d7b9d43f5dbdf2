"""Dataset builds: from videos, or from existing tars."""
