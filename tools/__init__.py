"""One program a file: parse, call the library, print. `tools/cli.py` gathers them into `regen`."""
