"""Reads streams into memories and asks what is to be asked, with or without an archive of their messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from memory_parts.stack import Look, Mending, Rows, Stack
from memory_parts.streams import Asked, Stream

from kvrag.archive.recall import Recall
from kvrag.embedding import HashedEmbedding
from kvrag.memory.base import MemoryPolicy
from kvrag.model import Model

Record = dict[str, Any]

_DEFAULTS = Recall()


@dataclass(frozen=True, slots=True)
class Archive:
    """How much of what was forgotten comes back for a question.

    Attributes:
        room: most tokens of all messages that are read again by all layers.
        candidates: messages that the search brings; the question looks at all of them, and those that it
            looks at most come back.
        keep: messages that come back at most.
        below: a message comes back if it gets at least this share of what the best one gets: of the mass that
            the question's last row pays it, summed over all layers and heads, times its similarity to the
            question to the power of `nearness`; as `kvrag.archive.recall.Recall` does it by default.
        nearness: see there.
        gold: the message that is needed comes back alone; a control.
    """

    room: int
    candidates: int = _DEFAULTS.search
    keep: int = _DEFAULTS.keep
    below: float = _DEFAULTS.below
    nearness: float = _DEFAULTS.nearness
    gold: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """A way to remember.

    Attributes:
        policy: what stays in memory.
        archives: what else may come back, by name; "" is nothing.
        mend: see `Stack`.
    """

    policy: MemoryPolicy
    archives: dict[str, Archive | None]
    mend: Mending | None = None


def found(stream: Stream, num: int) -> list[list[int]]:
    """The messages that an embedding of hashed words finds for each question, best first."""
    if not stream.asked:
        return []
    told = np.stack([_embedded(message.text) for message in stream.messages])
    asked = np.stack([_embedded(question.text) for question in stream.asked])
    order = np.argsort(-(asked @ told.T), axis=1, kind="stable")[:, :num]
    return [[int(i) for i in row] for row in order]


@cache
def _embedded(text: str) -> Any:
    return HashedEmbedding()([text])[0]


def _similarity(one: str, other: str) -> float:
    return float(_embedded(one) @ _embedded(other))


class _Kept:
    """Rows of the messages that may be wanted, picked up as they are read."""

    def __init__(self, streams: Sequence[Stream], wanted: Sequence[set[int]]) -> None:
        self.places: list[dict[int, slice]] = []
        self.streams, tokens = streams, []
        for b, (stream, numbers) in enumerate(zip(streams, wanted, strict=True)):
            places: dict[int, slice] = {}
            for number in sorted(numbers):
                message = stream.messages[number]
                first = len(tokens)
                tokens += [(b, i) for i in range(message.start, message.end)]
                places[number] = slice(first, len(tokens))
            self.places.append(places)
        self.tokens = torch.tensor(tokens, dtype=torch.long).view(-1, 2)
        self.keys = self.values = torch.empty(0)

    def take(self, first: int, num: int, fresh: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keep what is wanted of a stride that begins with token `first`; rows are [B, K, q, D] by layer."""
        if not len(self.tokens):
            return
        if not len(self.keys):
            kv_heads, dim = fresh[0][0].shape[1], fresh[0][0].shape[3]
            shape = (len(self.tokens), len(fresh), kv_heads, dim)
            self.keys, self.values = torch.empty(shape), torch.empty(shape)
        here = ((self.tokens[:, 1] >= first) & (self.tokens[:, 1] < first + num)).nonzero()[:, 0]
        b, t = self.tokens[here, 0], self.tokens[here, 1] - first
        for layer, (keys, values) in enumerate(fresh):
            self.keys[here, layer], self.values[here, layer] = keys[b, :, t], values[b, :, t]

    def rows(self, chosen: Sequence[Sequence[int]]) -> Rows:
        """Rows of some messages of each stream, in the order of the chat."""
        parts = [
            torch.cat(
                [torch.arange(0), *(torch.arange(len(self.tokens))[places[i]] for i in sorted(numbers))]
            )
            for places, numbers in zip(self.places, chosen, strict=True)
        ]
        counts = torch.tensor([len(part) for part in parts])
        index = torch.zeros(len(parts), max(1, int(counts.max())), dtype=torch.long)
        for row, part in zip(index, parts, strict=True):
            row[: len(part)] = part
        keys, values = (x[index].permute(0, 2, 3, 1, 4) for x in (self.keys, self.values))
        return Rows(keys, values, counts)


def ask_all(
    model: Model,
    setup: Setup,
    streams: Sequence[Stream],
    stride: int,
    *,
    candidates: Sequence[Sequence[Sequence[int]]] | None = None,
) -> list[list[Record]]:
    """Read streams of one length, then ask each its questions.

    Args:
        model: the reader.
        setup: what is remembered.
        streams: of equal lengths.
        stride: tokens that are read at once.
        candidates: what `found` gave for each stream; needed with an archive.

    Returns:
        For each stream, a record for each question: `answers` by archive, with whether it is right to the
        last token, digits that are right and digits there are; `kept`: share of the telling message's
        entries that were still in memory.
    """
    stack = Stack(model, setup.policy, len(streams), mend=setup.mend)
    wanted = [{asked.gold for asked in stream.asked} for stream in streams]
    for numbers, lists in zip(wanted, candidates or [[]] * len(streams), strict=True):
        numbers.update(i for row in lists for i in row)
    has_archive = any(setup.archives.values())
    kept = _Kept(streams, wanted if has_archive else [set() for _ in streams])
    asking = _Asking(model, setup, stack, streams, kept, candidates)
    ids = torch.tensor([stream.ids for stream in streams])
    records: list[list[Record]] = [[] for _ in streams]
    first = 0
    for at in sorted({asked.at for stream in streams for asked in stream.asked}):
        while first < at:
            part = ids[:, first : min(at, first + stride)]
            _, run = stack.read(part)
            kept.take(first, part.shape[1], run.fresh)
            first += part.shape[1]
        for b, record in asking.here(at):
            records[b].append(record)
    return records


class _Present:
    """Which messages are in memory, and how much of them."""

    def __init__(self, stack: Stack, streams: Sequence[Stream]) -> None:
        self.counts, kv_heads = [], stack.kv_heads
        ids = stack.state.ids.expand(-1, stack.num_streams * kv_heads, -1)
        for b, stream in enumerate(streams):
            own = ids[:, b * kv_heads : (b + 1) * kv_heads]
            count = torch.zeros(len(stream.ids))
            own = own[own >= 0]
            count.index_add_(0, own, torch.ones(len(own)))
            self.counts.append(count / (stack.layers * kv_heads))

    def share(self, b: int, stream: Stream, number: int) -> float:
        """Share of a message's entries, over layers and heads, that are there."""
        message = stream.messages[number]
        return float(self.counts[b][message.start : message.end].mean())


@dataclass(frozen=True, slots=True)
class _Asking:
    """Asks streams that stand side by side."""

    model: Model
    setup: Setup
    stack: Stack
    streams: Sequence[Stream]
    kept: _Kept
    candidates: Sequence[Sequence[Sequence[int]]] | None

    def here(self, at: int) -> Iterator[tuple[int, Record]]:
        """What is asked behind so many tokens: streams and records."""
        present = _Present(self.stack, self.streams)
        left = [[i for i, asked in enumerate(stream.asked) if asked.at == at] for stream in self.streams]
        for place in range(max(map(len, left))):
            yield from self._round([row[place] if place < len(row) else None for row in left], present)

    def _round(self, chosen: Sequence[int | None], present: _Present) -> Iterator[tuple[int, Record]]:
        """One question of each stream that has one left; the others are asked another's, in vain."""
        asked = [None if i is None else s.asked[i] for s, i in zip(self.streams, chosen, strict=True)]
        some = next(question for question in asked if question)
        filled = [question or some for question in asked]
        answers: list[dict[str, Any]] = [{} for _ in self.streams]
        for name, archive in self.setup.archives.items():
            rows = None
            if archive is not None:
                rows = self._recalled(archive, filled, self._lost(archive, chosen, present))
            judged = _judged(self.model, self.stack, filled, rows, self.streams[0].pinned)
            for answer, found_out in zip(answers, judged, strict=True):
                answer[name] = found_out
        for b, question in enumerate(asked):
            if question:
                record = {
                    "kind": question.kind,
                    "cell": question.cell,
                    "distance": question.distance,
                    "kept": round(present.share(b, self.streams[b], question.gold), 4),
                    "answers": answers[b],
                }
                yield b, record

    def _lost(self, archive: Archive, chosen: Sequence[int | None], present: _Present) -> list[list[int]]:
        """For each stream, the messages that may come back: those that are not wholly there."""
        assert self.candidates is not None
        lists: list[list[int]] = [[] for _ in self.streams]
        for b, (stream, i) in enumerate(zip(self.streams, chosen, strict=True)):
            if i is not None:
                able = [stream.asked[i].gold] if archive.gold else self.candidates[b][i]
                lists[b] = [number for number in able if present.share(b, stream, number) < 1]
        return lists

    def _recalled(
        self, archive: Archive, asked: Sequence[Asked], lists: Sequence[Sequence[int]]
    ) -> Rows | None:
        """Rows of the messages that come back: of the candidates, those that the question looks at most."""
        if not any(lists):
            return None
        chosen = [list(numbers[: archive.candidates]) for numbers in lists]
        if not archive.gold:
            rows = torch.tensor([len(q.prompt) - 1 for q in asked])
            look = Look(range(self.stack.layers), rows)
            ids = _padded([q.prompt for q in asked])
            self.stack.ask(ids, self.kept.rows(chosen), num_front=self.streams[0].pinned, look=look)
            looked = zip(torch.cat(look.found, 1).sum(1), self.streams, asked, chosen, strict=True)
            chosen = [_best(mass, stream, one, numbers, archive) for mass, stream, one, numbers in looked]
        return self.kept.rows(chosen) if any(chosen) else None


def _best(
    mass: torch.Tensor, stream: Stream, asked: Asked, numbers: Sequence[int], archive: Archive
) -> list[int]:
    """The messages most looked at, as many as fit; `mass` is [n] over their rows in order."""
    near = {n: max(0.0, _similarity(asked.text, stream.messages[n].text)) for n in numbers}
    scores, lengths, first = {}, {}, 0
    for number in sorted(numbers):
        lengths[number] = stream.messages[number].end - stream.messages[number].start
        own = float(mass[first : first + lengths[number]].sum())
        scores[number] = own * (near[number] / (max(near.values()) or 1.0)) ** archive.nearness
        first += lengths[number]
    chosen, room = [], archive.room
    for number in sorted(scores, key=lambda n: -scores[n])[: archive.keep]:
        if lengths[number] <= room and scores[number] >= archive.below * max(scores.values()):
            chosen.append(number)
            room -= lengths[number]
    return chosen


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _judged(
    model: Model, stack: Stack, asked: Sequence[Asked], rows: Rows | None, num_front: int
) -> Iterator[list[int]]:
    """For each question: whether the answer is right to the last token; digits right; digits there are."""
    ids = _padded([(*q.prompt, *q.answer) for q in asked])
    predicted = stack.ask(ids, rows, num_front=num_front).argmax(-1)
    for row, question in zip(predicted, asked, strict=True):
        first = len(question.prompt) - 1
        said = row[first : first + len(question.answer)].tolist()
        right = int(said == list(question.answer))
        digits = [_digits(model, said[i], question.answer[i]) for i in question.values]
        yield [right, sum(d[0] for d in digits), sum(d[1] for d in digits)]


def _digits(model: Model, said: int, answer: int) -> tuple[int, int]:
    """How many digits of a token are right, and how many it has."""
    wanted = model.text.tokenizer.decode([answer]).strip()
    if not wanted.isdigit():
        return 0, 0
    got = model.text.tokenizer.decode([said]).strip()
    return sum(a == b for a, b in zip(wanted, got, strict=False)), len(wanted)
