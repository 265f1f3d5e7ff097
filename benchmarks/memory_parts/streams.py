"""What `benchmarks/memory.py` reads: chats of an exact length, and what is asked about them.

Streams of one length can be read side by side. So their last turn is small talk that fills what is left, to
the token, and a question always comes right behind a finished turn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrag.reader import chats, prose, questions, rows
from kvrag.reader.chats import Chat, Turn
from kvrag.reader.facts import Fact
from kvrag.reader.questions import Question, Span
from kvrag.reader.rows import Row
from kvrag.reader.tokenizer import SYSTEM_CHAT, Encoder
from kvrag.reader.world import World

LEAST_FILL = 40
# A last turn of any such length can be made of sentences of hay.
_LEAST_FILL, _ROOM = LEAST_FILL, 90
# From here on no turn is begun that may be longer than what is left.
_ENDING = 420
# A turn that tells a passkey takes at most so many tokens.
_TELLING = 60


@dataclass(frozen=True, slots=True)
class Message:
    """A user's or an assistant's message: its first token, the one behind its last, and its words."""

    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a stream.

    Attributes:
        kind: "fact" or "passkey".
        text: the question's words.
        prompt: its tokens, up to and with the one that begins the answer.
        answer: the answer's tokens, with the end.
        values: which tokens of the answer had to be found.
        gold: number of the message that tells it.
        at: tokens that stand before it.
        distance: tokens from that message's end to the question.
        cell: where it counts: distances, or lengths in budgets.
    """

    kind: str
    text: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    values: tuple[int, ...]
    gold: int
    at: int
    distance: int
    cell: float


@dataclass(slots=True)
class Stream:
    """Tokens, the messages in them, and what is asked behind the last one."""

    ids: list[int]
    messages: list[Message] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    pinned: int = 0


class Writer:
    """Writes a chat turn by turn and keeps count of its tokens."""

    def __init__(self, encoder: Encoder, system: str = SYSTEM_CHAT) -> None:
        """Begin with the system message."""
        self.row = Row(encoder)
        self.row.system(system)
        self.pinned = len(self.row.ids)
        self.messages: list[Message] = []

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self.row.ids)

    def size(self, turn: Turn) -> int:
        """Tokens that a turn would take."""
        row = Row(self.row.encoder)
        self._add(row, turn)
        return len(row.ids)

    def add(self, turn: Turn) -> int:
        """Append a turn; gives the number of the user's message."""
        start = len(self.row.ids)
        self._add(self.row, turn)
        middle = start + self.row.ids[start:].index(self.row.encoder.special["<|end|>"]) + 1
        self.messages += [
            Message(start, middle, turn.user),
            Message(middle, len(self.row.ids), turn.assistant),
        ]
        return len(self.messages) - 2

    @staticmethod
    def _add(row: Row, turn: Turn) -> None:
        spans = turn.question.spans if turn.question else (Span(turn.assistant),)
        row.turn(turn.user, spans, counts=turn.question is not None)

    def fill(self, rng: random.Random, length: int) -> None:
        """Append one turn of hay of exactly so many tokens (at least about 40)."""
        reply = rng.choice(prose.ACKNOWLEDGEMENTS)
        sizes = {s: len(self.row.encoder(f" {s}")) for s in prose.HAY}
        left = length - self.size(Turn("", reply)) + len(self.row.encoder(" "))
        chosen: list[str] = []
        while left:
            able = [s for s in prose.HAY if _is_sum(left - sizes[s])]
            chosen.append(rng.choice(able))
            left -= sizes[chosen[-1]]
        self.add(Turn(" ".join(chosen), reply))

    def asked(self, question: Question, kind: str, gold: int, cell: float, length: int) -> Asked:
        """A question behind `length` tokens."""
        row = Row(self.row.encoder)
        row.turn(question.text, question.spans)
        first = row.ids.index(row.encoder.special["<|assistant|>"]) + 1
        values = tuple(i - first for i in range(first, len(row.ids)) if row.kinds[i] == rows.VALUE)
        return Asked(
            kind,
            question.text,
            tuple(row.ids[:first]),
            tuple(row.ids[first:]),
            values,
            gold,
            length,
            length - self.messages[gold].end,
            cell,
        )

    def stream(self, asked: Sequence[Asked] = ()) -> Stream:
        """What was written."""
        return Stream(self.row.ids, self.messages, list(asked), self.row.kinds, self.pinned)


def _is_sum(length: int) -> bool:
    """Whether a length is a sum of sentences' lengths, which are 4, 5 and 6."""
    return length == 0 or (length >= 4 and length != 7)


def facts_stream(
    seed: str, encoder: Encoder, length: int, distances: Sequence[int], *, each: int = 4
) -> Stream:
    """A chat of small turns (as `kvrag.reader.chats.distant` has them), asked for facts told long ago.

    Args:
        seed: the same gives the same.
        encoder: turns text into ids.
        length: tokens of the chat.
        distances: tokens between the telling and the question; facts within a quarter of each are asked.
        each: most facts for each distance; those that the chat itself asked for since are left out.
    """
    rng = random.Random(seed)
    world = World(rng.getrandbits(48), held_out=True)
    chat, writer = Chat(world), Writer(encoder)
    told: list[tuple[Fact, int]] = []
    answered: dict[str, int] = {}
    while len(writer) < length - _ROOM:
        num_facts, num_turns = len(chat.told), len(chat.turns)
        _turn(chat, is_ending=len(writer) > length - _ENDING)
        (turn,) = chat.turns[num_turns:]
        if len(writer) + writer.size(turn) > length - _LEAST_FILL:
            break
        number = writer.add(turn)
        if turn.question:
            answered[turn.assistant] = number
        told += [(fact, number) for fact, kind in chat.told[num_facts:] if kind == "told"]
    writer.fill(rng, length - len(writer))
    free = [(f, n) for f, n in told if answered.get("".join(s.text for s in questions.restate(f)), -1) < n]
    asked = []
    for distance in distances:
        near = [
            (fact, n) for fact, n in free if abs(length - writer.messages[n].end - distance) <= distance / 4
        ]
        for fact, n in rng.sample(near, min(each, len(near))):
            free.remove((fact, n))
            asked.append(writer.asked(questions.ask(rng, fact, "told"), "fact", n, distance, length))
    return writer.stream(asked)


def _turn(chat: Chat, *, is_ending: bool) -> None:
    """One turn; a short one near the end."""
    num_turns = len(chat.turns)
    while len(chat.turns) == num_turns:
        if not is_ending:
            chats.small_turn(chat)
        elif chat.rng.random() < 0.5:
            chat.talk()
        else:
            chat.tell()


def passkey_stream(
    seed: str, encoder: Encoder, before: int, distances: Sequence[int], cells: Sequence[float]
) -> Stream:
    """Hay with one passkey, asked for again and again.

    Args:
        seed: the same gives the same.
        encoder: turns text into ids.
        before: tokens that stand before the turn that tells it; 0: it comes first.
        distances: tokens from the end of that turn to each question, as far apart as a turn is long.
        cells: of the questions.
    """
    rng = random.Random(seed)
    writer = Writer(encoder)
    key, telling = prose.passkey(rng)
    if before:
        _hay(writer, rng, before - len(writer))
    # The turn that tells takes up as much in every stream.
    writer.add(Turn(f"{prose.hay(rng, 2)} {telling}", rng.choice(prose.ACKNOWLEDGEMENTS)))
    gold, begun = len(writer.messages) - 2, before + _TELLING
    question, asked = chats.passkey_question(key), []
    for distance, cell in sorted(zip(distances, cells, strict=True)):
        _hay(writer, rng, begun + distance - len(writer))
        asked.append(writer.asked(question, "passkey", gold, cell, len(writer)))
    return writer.stream(asked)


def _hay(writer: Writer, rng: random.Random, length: int) -> None:
    """Turns of hay of exactly so many tokens together."""
    while length:
        size = rng.randint(_LEAST_FILL, 150)
        if length - size < _LEAST_FILL:
            size = length
        writer.fill(rng, size)
        length -= size


def text_stream(seed: str, encoder: Encoder, length: int, kind: str) -> Stream:
    """Generated text to be predicted: "chat", or "documents" with questions about them."""
    rng = random.Random(seed)
    world = World(rng.getrandbits(48), held_out=True)
    if kind == "chat":
        row = rows.chat_row(world, encoder, length)
    else:
        row = rows.document_row(world, encoder, length, share=0.5)
    pinned = row.ids.index(encoder.special["<|end|>"]) + 1 if kind == "chat" else 4
    return Stream(row.ids, kinds=row.kinds, pinned=pinned)
