"""Dataset inspection: verification, overview in numbers, contact sheets."""
