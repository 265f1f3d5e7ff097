"""What is asked: documents out of a pool, new questions; and what requests have in common."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    Attributes:
        documents: numbers in the pool, in the order of the prompt.
        question: tokens.
    """

    documents: tuple[int, ...]
    question: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Took:
    """What an answer took.

    Attributes:
        first: seconds from having the prompt's tokens to having chosen the first new one.
        first_busy: the same on the processor, of all threads; on a busy machine it says more.
        each: seconds per further token; None: there was none.
        each_busy: the same on the processor.
        reused: tokens of the prompt that were not read anew.
        token: the first one.
    """

    first: float
    first_busy: float
    each: float | None
    each_busy: float | None
    reused: int
    token: int


class Clock:
    """Seconds on the wall and on the processor since it was made, or since the first token."""

    def __init__(self) -> None:
        """Start."""
        self._start = self._now()
        self._first = self._last = self._start

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def first(self) -> None:
        """The first token is there."""
        self._first = self._last = self._now()

    def last(self) -> None:
        """All tokens are there."""
        self._last = self._now()

    def took(self, more: int, reused: int, token: int) -> Took:
        """What an answer took that has `more` further tokens."""
        (start, busy), (first, first_busy), (last, last_busy) = self._start, self._first, self._last
        each = ((last - first) / more, (last_busy - first_busy) / more) if more else (None, None)
        return Took(first - start, first_busy - busy, *each, reused, token)


class Pool:
    """Documents of equal length, all different, and questions that never come twice."""

    def __init__(
        self, num_documents: int, document_tokens: int, question_tokens: int, vocabulary: int
    ) -> None:
        """Draw random tokens; five are left for special ones."""
        self._draws = torch.Generator().manual_seed(1)
        self._choices = random.Random(1)
        self._vocabulary, self._question = vocabulary, question_tokens
        self.document_tokens = document_tokens
        self.documents = [self._tokens(document_tokens) for _ in range(num_documents)]

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, self._vocabulary, (count,), generator=self._draws).tolist())

    def ask(self, documents: Sequence[int]) -> Request:
        """A new question about these documents."""
        return Request(tuple(documents), self._tokens(self._question))

    def draw(self, count: int, besides: Sequence[int] = ()) -> tuple[int, ...]:
        """Different documents in any order, none of `besides`."""
        return tuple(self._choices.sample([d for d in range(len(self.documents)) if d not in besides], count))

    def prompt(self, request: Request) -> list[int]:
        """All tokens, documents first."""
        read = [token for number in request.documents for token in self.documents[number]]
        return [*read, *request.question]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How far two sequences begin alike."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def moved(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many of `wanted` a common beginning and runs moved to the front give: `--cache-reuse` of llama.cpp.

    It goes through what is held once; what has to move towards the end is lost, with all before it.
    """
    at = found = common(held, wanted)
    for one in held[at:]:
        if found < len(wanted) and one == wanted[found]:
            found += 1
    return found


def many(count: int, pool: int, each: int, skew: float) -> list[tuple[int, ...]]:
    """Requests at random; the document of rank r is drawn with weight 1 / r ** skew (0: all alike)."""
    choices = random.Random(2)
    weights = [1 / (rank + 1) ** skew for rank in range(pool)]

    def draw() -> tuple[int, ...]:
        # Drawn by weight and not put back (Efraimidis and Spirakis 2006); the order is that of the draws.
        keys = [choices.random() ** (1 / weight) for weight in weights]
        return tuple(sorted(range(pool), key=keys.__getitem__, reverse=True)[:each])

    return [draw() for _ in range(count)]


def shares(requests: Sequence[tuple[int, ...]], room: int) -> dict[str, float]:
    """Share of documents that need not be read anew, by what is kept; nothing is there at first.

    Args:
        requests: one after the other.
        room: number of prompts that take as many rows as all documents.
    """
    last_few = f"last {room} prompts"
    found = dict.fromkeys(
        ("last prompt", "last prompt, runs moved", last_few, "all prompts", "each document"), 0
    )
    before: tuple[int, ...] = ()
    few: deque[tuple[int, ...]] = deque(maxlen=room)
    beginnings: set[tuple[int, ...]] = set()
    seen: set[int] = set()
    for documents in requests:
        found["last prompt"] += common(before, documents)
        found["last prompt, runs moved"] += moved(before, documents)
        lengths = range(1, len(documents) + 1)
        found[last_few] += max((common(held, documents) for held in few), default=0)
        found["all prompts"] += sum(documents[:length] in beginnings for length in lengths)
        found["each document"] += len(seen.intersection(documents))
        beginnings.update(documents[:length] for length in lengths)
        seen.update(documents)
        few.append(documents)
        before = documents
    total = sum(map(len, requests))
    return {name: count / total for name, count in found.items()}
