"""The work of `benchmarks/memory.py` in pieces that can be done in any order, by several processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from memory_parts.asking import Archive, Setup, ask_all, found
from memory_parts.entries import (
    ARCHIVED,
    BY_NAME,
    ENTRIES,
    FULL,
    NOTHING,
    SALIENT,
    SLOW,
    WINDOW,
    archives,
)
from memory_parts.stack import Stack
from memory_parts.streams import LEAST_FILL, Stream, facts_stream, passkey_stream, text_stream

from kvrag.archive.recall import Recall
from kvrag.model import Model
from kvrag.reader.tokenizer import Encoder

NEAR, FAR, PASSKEY, CHAT, DOCUMENTS = "near", "far", "passkey", "chat", "documents"
TASKS = (NEAR, FAR, PASSKEY, CHAT, DOCUMENTS)
BATCH = 16
# Tokens of a chat, and how far back its facts were told.
LENGTHS = {NEAR: 2240, FAR: 26_000, CHAT: 2048, DOCUMENTS: 2048}
DISTANCES = {NEAR: (128, 256, 512, 1024, 2048), FAR: (4096, 8192, 16_384, 25_600)}
EACH = {NEAR: 3, FAR: 14}
# What an archive gives back by default was chosen with the streams that "far" had at first.
SEEDS = {FAR: "far, held out"}
# Lengths in budgets that a passkey is hidden in, and at how many depths, one for each batch.
TIMES = (1, 2, 4, 8, 16)
DEPTHS = 13
BINS = (0, 256, 512, 1024, 2048)
CANDIDATES = Recall().search

# What the claims are about; what else is shown; what is asked for the oldest facts.
_CORE = (WINDOW, "cascade 2", "cascade 4", "cascade 8", "ladder 1/2", SALIENT, SLOW)
_SOME = (*_CORE, "combined 4, bonus 1")
_FAR = (WINDOW, SALIENT, "cascade 4")


@dataclass(frozen=True, slots=True)
class Unit:
    """One policy on one batch of streams.

    Attributes:
        task: one of `TASKS`.
        policy: name of an entry.
        budget: tokens of memory and what comes back, together.
        room: tokens of that for what comes back.
        batch: which streams.
    """

    task: str
    policy: str
    budget: int
    room: int
    batch: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return tuple(asdict(self).values())


def units(tasks: Sequence[str], budget: int, batches: int) -> Iterator[Unit]:
    """All of them, those first that are worth most; each round asks every cell as often.

    Args:
        tasks: which.
        budget: the smaller one.
        batches: rounds; a task that needs fewer has fewer.
    """
    room = budget // 4
    every = [entry.name for entry in ENTRIES]
    first = (
        (NEAR, _CORE, budget, 0, 7),
        (PASSKEY, _CORE, budget, 0, DEPTHS),
        (FAR, _FAR, budget, room, 2),
        (CHAT, (FULL, *_CORE), 4 * budget, 0, 1),
        (DOCUMENTS, (FULL, *_CORE), 4 * budget, 0, 1),
        (NEAR, (WINDOW, "cascade 4", SALIENT), budget, room, 5),
    )
    rest = (
        (NEAR, every, budget, 0, 7),
        (NEAR, ARCHIVED, budget, room, 7),
        (PASSKEY, (FULL, *_SOME), budget, 0, DEPTHS),
        (FAR, ARCHIVED, budget, room, 2),
        (CHAT, (FULL, *_SOME), 4 * budget, 0, 2),
        (DOCUMENTS, (FULL, *_SOME), 4 * budget, 0, 2),
        (CHAT, (FULL, *_SOME), budget, 0, 2),
        (DOCUMENTS, (FULL, *_SOME), budget, 0, 2),
        (NEAR, _SOME, 2 * budget, 0, 7),
        (PASSKEY, (WINDOW, SALIENT), budget, room, DEPTHS),
    )
    given: set[Unit] = set()
    for plans in (first, rest):
        for batch in range(batches):
            for task, names, tokens, back, most in plans:
                made = [Unit(task, name, tokens, back, batch) for name in names]
                if task in tasks and batch < most:
                    yield from (unit for unit in made if unit not in given)
                    given.update(made)


class Worker:
    """Does units with one model."""

    def __init__(self, model: Model, *, batch: int = BATCH, scale: int = 1) -> None:
        """Prepare.

        Args:
            model: the reader.
            batch: streams side by side.
            scale: divides all lengths, for the smallest form.
        """
        self.model, self.batch, self.scale = model, batch, scale
        self._encoder = Encoder(model.text.tokenizer)
        self._streams = lru_cache(2)(self._make)
        self._found = lru_cache(2)(self._search)

    def do(self, unit: Unit) -> dict[str, Any]:
        """The record of a unit."""
        began = time.process_time()
        results = self._losses(unit) if unit.task in (CHAT, DOCUMENTS) else self._asked(unit)
        seconds = round(time.process_time() - began, 2)
        return {**asdict(unit), "results": results, "cpu_seconds": seconds}

    def _make(self, task: str, batch: int, budget: int) -> list[Stream]:
        seeds = [f"{SEEDS.get(task, task)}/{batch * self.batch + i}" for i in range(self.batch)]
        if task == PASSKEY:
            distances = passkey_distances(batch, budget)
            return [passkey_stream(seed, self._encoder, budget, distances, TIMES) for seed in seeds]
        length = LENGTHS[task] // self.scale
        if task in (CHAT, DOCUMENTS):
            return [text_stream(seed, self._encoder, length, task) for seed in seeds]
        distances = [distance // self.scale for distance in DISTANCES[task]]
        return [facts_stream(s, self._encoder, length, distances, each=EACH[task]) for s in seeds]

    def _search(self, *key: Any) -> list[list[list[int]]]:
        return [found(stream, CANDIDATES) for stream in self._streams(*key)]

    def _key(self, unit: Unit) -> tuple[str, int, int]:
        """What tells the unit's streams: most tasks have the same for all budgets."""
        return unit.task, unit.batch, unit.budget if unit.task == PASSKEY else 0

    def _setup(self, unit: Unit, sinks: int) -> Setup:
        entry = BY_NAME[unit.policy]
        back: dict[str, Archive | None] = archives(unit.room) if unit.room else {NOTHING: None}
        return Setup(entry.at(unit.budget - unit.room, sinks), back, entry.mend)

    def _asked(self, unit: Unit) -> list[list[Any]]:
        """A row for each question: cell, distance, share kept, then what `asking` judges of each answer."""
        key = self._key(unit)
        streams = self._streams(*key)
        setup = self._setup(unit, streams[0].pinned)
        candidates = self._found(*key) if unit.room else None
        records = ask_all(self.model, setup, streams, unit.budget // 4, candidates=candidates)
        return [
            [r["cell"], r["distance"], r["kept"], r["answers"]] for of_stream in records for r in of_stream
        ]

    def _losses(self, unit: Unit) -> list[list[list[float]]]:
        """For each stream and each part of it (`BINS`): loss and number of all tokens, and of values."""
        streams = self._streams(*self._key(unit))
        setup = self._setup(unit, streams[0].pinned)
        stack = Stack(self.model, setup.policy, len(streams), mend=setup.mend)
        ids = torch.tensor([stream.ids for stream in streams])
        stride = unit.budget // 4
        parts = []
        for first in range(0, ids.shape[1], stride):
            losses, _ = stack.read(ids[:, first : first + stride], want_losses=True)
            assert losses is not None
            parts.append(losses)
        found_losses = torch.cat(parts, 1).double()
        kinds = torch.tensor([stream.kinds for stream in streams])
        return [
            [_bin(x, k, i) for i in range(len(BINS) - 1)] for x, k in zip(found_losses, kinds, strict=True)
        ]


def passkey_distances(batch: int, budget: int) -> list[int]:
    """How far behind the passkey each length ends: the passkey's depth is another one in every batch.

    Batches take the middles of `DEPTHS` equal parts of the length, in an order that mixes them; lengths that
    are asked for in the same stream must be a turn apart.
    """
    depth = (batch * 5 % DEPTHS + 0.5) / DEPTHS
    distances: list[int] = []
    for times in TIMES:
        distance = round(depth * times * budget)
        distances.append(max(distance, distances[-1] + LEAST_FILL if distances else LEAST_FILL))
    return distances


def _bin(losses: torch.Tensor, kinds: torch.Tensor, number: int) -> list[float]:
    part = slice(max(1, BINS[number]), BINS[number + 1])
    some, values = losses[part], kinds[part] == 2
    return [
        round(float(some.sum()), 4),
        len(some),
        round(float(some[values].sum()), 4),
        int(values.sum()),
    ]
