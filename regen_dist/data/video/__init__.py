"""Reading, cutting and encoding video."""
