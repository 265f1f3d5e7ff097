"""What the rooms of the store tell each other about files that cannot be used."""

from __future__ import annotations


class Damaged(Exception):
    """A file of the store is not what it has to be; the message says in what."""
