"""The command line: kvrag ingest | ask | ls | rm | stats | reconcile | doctor | demo."""

from kvrag.cli.program import app, main

__all__ = ["app", "main"]
