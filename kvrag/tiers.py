"""How a known text may stand in a prompt, and what is told of one that was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Tier = Literal["exact", "canonical", "partial", "middle", "markers"]

TIERS: tuple[Tier, ...] = ("markers", "exact", "canonical", "partial", "middle")
"""All tiers, in the order in which they are tried: what one has found, the later ones do not look at."""


@dataclass(frozen=True, slots=True)
class Found:
    """A known text, or a piece of one, at a place of a prompt.

    Attributes:
        start: place of its first character in the prompt.
        end: place behind its last character.
        key: of the text.
        tier: how it was found.
        text: the known text as it was given, if the prompt has something else than all of it.
        offset: first character of that text that stands here, for pieces.
        mark: place where the mark in front of it begins.
    """

    start: int
    end: int
    key: str
    tier: Tier = "exact"
    text: str | None = None
    offset: int = 0
    mark: int | None = None


class Place(Protocol):
    """What every found text has."""

    @property
    def start(self) -> int:
        """Place of its first character."""
        ...

    @property
    def end(self) -> int:
        """Place behind its last character."""
        ...

    @property
    def key(self) -> str:
        """Of the text."""
        ...


class Finder(Protocol):
    """What finds known texts in a prompt."""

    def find(self, prompt: str, start: int = 0) -> Sequence[Place]:
        """Known texts in `prompt[start:]`, in order, none overlapping another."""
        ...
