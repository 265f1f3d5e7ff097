"""Training rows: token ids and, for each token, what it counts for in the loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvrag.reader import chats, prose, questions
from kvrag.reader.questions import Span
from kvrag.reader.tokenizer import BLANK_LINE, SYSTEM_CHAT, SYSTEM_DOCUMENTS, Encoder
from kvrag.reader.world import Document, World

# What a token counts for: nothing but language, words of an answer, or what the answer had to find.
OTHER, WORDS, VALUE = 0, 1, 2

# A token that is part of no document, or of a name itself.
NOBODY = (-1, -1)

# Questions asked of one context, by kind; those a context does not offer are left out.
SHARES = {"one": 0.26, "crossing": 0.28, "dated": 0.08, "two_hop": 0.09, "compare": 0.07, "unknown": 0.22}


@dataclass(slots=True)
class Row:
    """A row being written.

    Attributes:
        encoder: turns text into ids.
        ids: token ids.
        kinds: `OTHER`, `WORDS` or `VALUE` for each token.
        about: for each token the two words, as ids, that name whom its document is about, or `NOBODY`.
    """

    encoder: Encoder
    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    about: list[tuple[int, int]] = field(default_factory=list)

    def text(self, text: str, kind: int = OTHER, about: tuple[int, int] = NOBODY) -> None:
        """Append text."""
        ids = self.encoder(text)
        self.ids += ids
        self.kinds += [kind] * len(ids)
        self.about += [about] * len(ids)

    def special(self, *tokens: str, kind: int = OTHER) -> None:
        """Append special tokens."""
        self.ids += [self.encoder.special[token] for token in tokens]
        self.kinds += [kind] * len(tokens)
        self.about += [NOBODY] * len(tokens)

    def system(self, text: str) -> None:
        """Begin a conversation."""
        self.special("<s>", "<|system|>")
        self.text(f" {text}")
        self.special("<|end|>")

    def documents(self, documents: Iterable[Document], others: Iterable[str] = ()) -> None:
        """Begin a conversation over these documents, and others about nobody.

        The ids are those of `system(system_text(documents))`: no token reaches across a blank line.
        """
        self.special("<s>", "<|system|>")
        self.text(f" {SYSTEM_DOCUMENTS}")
        for document in documents:
            name = self.encoder(f" {document.entity.name}")
            about = (name[0], name[-1])
            for i, part in enumerate(document.parts):
                self.text(BLANK_LINE)
                first = len(self.ids)
                self.text(part, about=about)
                if i == 0:
                    self.about[first : first + len(name)] = [NOBODY] * len(name)
        for other in others:
            self.text(f"{BLANK_LINE}{other}")
        self.special("<|end|>")

    def cut(self, length: int) -> None:
        """Leave out what stands behind the first tokens."""
        self.ids, self.kinds, self.about = self.ids[:length], self.kinds[:length], self.about[:length]

    def turn(self, user: str, spans: Iterable[Span], *, counts: bool = True) -> None:
        """Append a user's message and its answer, which counts in the loss or does not."""
        self.special("<|user|>")
        self.text(f" {user}")
        self.special("<|end|>", "<|assistant|>")
        first, before = len(self.ids), " "
        for span in spans:
            kind = OTHER if not counts else VALUE if span.is_value else WORDS
            self.text(before + span.text, kind)
            before = ""
        if counts and len(self.ids) > first:
            # The first word says whether there is an answer at all.
            self.kinds[first] = VALUE
        self.special("<|end|>", kind=WORDS if counts else OTHER)


def system_text(documents: Iterable[Document]) -> str:
    """The system message of a prompt over these documents."""
    return BLANK_LINE.join((SYSTEM_DOCUMENTS, *(document.text for document in documents)))


def document_row(world: World, encoder: Encoder, length: int, *, share: float) -> Row:
    """One or more conversations over documents, each with many questions.

    Args:
        world: draws documents of `world.mix.tokens` tokens each.
        encoder: turns text into ids.
        length: tokens of the row.
        share: of the row that the first conversation's documents fill.
    """
    row = Row(encoder)
    while len(row.ids) < length:
        room = length - len(row.ids)
        average = sum(world.mix.tokens) / 2.2
        documents = world.documents(max(1, round(room * share / average)))
        hay, passkey = _hay(world, room)
        row.documents(documents, hay)
        for question in (*passkey, *_mixed(world, documents)):
            row.turn(question.text, question.spans)
            if len(row.ids) >= length:
                break
    row.cut(length)
    return row


def _hay(world: World, room: int) -> tuple[list[str], list[questions.Question]]:
    """Now and then, documents of hay with a passkey, and the question for it."""
    if world.rng.random() >= 0.12:
        return [], []
    key, texts = prose.hay_documents(world.rng, world.rng.randint(3, max(4, room // 40)))
    return texts, [chats.passkey_question(key)]


def _mixed(world: World, documents: list[Document]) -> Iterable[questions.Question]:
    offered = questions.every_kind(world, documents, num_unknown=len(documents))
    while any(offered.values()):
        kinds = [kind for kind, left in offered.items() if left]
        if kinds == ["unknown"]:
            return
        kind = world.rng.choices(kinds, [SHARES[k] for k in kinds])[0]
        yield offered[kind].pop()


def chat_row(world: World, encoder: Encoder, length: int) -> Row:
    """One chat without documents."""
    row = Row(encoder)
    row.system(SYSTEM_CHAT)
    chat = chats.Chat(world)
    talk, asked = world.rng.choice((0.15, 0.4, 0.7)), world.rng.choice((0.25, 0.45, 0.6))
    while len(row.ids) < length:
        num_before = len(chat.turns)
        chats.random_turn(chat, questions=asked, talk=talk)
        for turn in chat.turns[num_before:]:
            if turn.question is None:
                row.turn(turn.user, [Span(turn.assistant)], counts=False)
            else:
                row.turn(turn.user, turn.question.spans)
    row.cut(length)
    return row
