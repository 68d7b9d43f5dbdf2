"""Command-line programs, one per file: parse, call the library, print. `tools/cli.py` combines them into `regen`."""
