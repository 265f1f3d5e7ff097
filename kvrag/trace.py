"""Where the rows of an answer's documents came from, and why from there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

READ = "read"
"""Not in the store: read for this answer, and kept."""

RECOMPUTED = "recomputed"
"""In the store, and read anew because that was faster than loading it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Load a document or read it anew, and why.

    Attributes:
        recompute: read it anew.
        reason: in words, with the numbers that it rests on.
        load_seconds: what loading it was expected to take; None: nobody had to know.
        recompute_seconds: the same for reading it anew.
    """

    recompute: bool
    reason: str
    load_seconds: float | None = None
    recompute_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class DocumentTrace:
    """One document of an answer.

    Attributes:
        key: the name it was given under.
        num_tokens: its length.
        origin: the tier that its rows came from ("memory", "mapped", "disk", "objects", ...), "recomputed"
            or "read".
        num_bytes: bytes of rows that were read from there for this answer; 0 where they lay in memory.
        seconds: that loading took, in all threads; where it was read by the model, its share of that.
        is_prefetched: it was asked for before the prompt was read.
        choice: load or recompute.
    """

    key: str
    num_tokens: int
    origin: str
    num_bytes: int
    seconds: float
    is_prefetched: bool
    choice: Choice


@dataclass(frozen=True, slots=True)
class Trace:
    """Where an answer's rows came from.

    Attributes:
        documents: in the order of the prompt.
        full_prefill_seconds: what reading the whole prompt without caches was expected to take; None: the
            model's speed is not known (`Engine.measure`).
    """

    documents: tuple[DocumentTrace, ...] = ()
    full_prefill_seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The trace for JSON."""
        return asdict(self)
