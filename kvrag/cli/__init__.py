"""The command line: what `kvrag` does, each group of commands in a room of its own, in order in `program`."""

from kvrag.cli.program import app, main

__all__ = ["app", "main"]
