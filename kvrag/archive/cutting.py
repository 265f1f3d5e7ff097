"""Cutting a chat into spans while it is read: at the borders of messages, else of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrag.archive.span import Mark, RawRows, Span, local_rows
from kvrag.errors import ConfigError
from kvrag.rotary import LayerSpec
from kvrag.sessions.turn import ANSWERS
from kvrag.text import Text

MAX_TOKENS = 128

_ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens that came together, of one message.

    Attributes:
        seconds: that reading one of them took.
    """

    tokens: tuple[int, ...]
    rows: RawRows
    role: str
    seconds: float

    def cut(self, num_tokens: int) -> tuple[_Piece, _Piece]:
        """The first tokens, and the others."""
        return self._part(0, num_tokens), self._part(num_tokens, len(self.tokens))

    def _part(self, start: int, end: int) -> _Piece:
        rows = [(keys[:, start:end], values[:, start:end]) for keys, values in self.rows]
        return _Piece(self.tokens[start:end], rows, self.role, self.seconds)


class Cutter:
    """Takes a chat's tokens with their rows as they are read, and gives them back in spans.

    A span never reaches from one turn into the next, so that undoing a turn takes back whole spans. Question
    and answer are joined if they fit: "I see." on its own is worth no look. What is too long is cut behind a
    message, else behind a sentence, else before a word, else anywhere.

    Attributes:
        mark: behind the last span that was given. Between two turns it says all there is to a cutter.
    """

    def __init__(
        self, text: Text, specs: Sequence[LayerSpec], *, at: Mark | None = None, max_tokens: int = MAX_TOKENS
    ) -> None:
        """Begin at a place.

        Args:
            text: the model's tokenizer.
            specs: each layer's rotation.
            at: where the chat goes on; None: its beginning.
            max_tokens: of a span.

        Raises:
            ConfigError: spans of less than a token.
        """
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens}: expected at least 1")
        self._text, self._specs, self.max_tokens = text, specs, max_tokens
        self.mark = at or Mark()
        self._pieces: list[_Piece] = []

    def feed(self, tokens: Sequence[int], rows: RawRows, role: str, *, seconds: float = 0.0) -> list[Span]:
        """Take the next tokens; the spans that are complete now.

        Args:
            tokens: any number, of one message.
            rows: theirs in every layer; copied only when a span is made of them.
            role: who says them.
            seconds: that reading them took.
        """
        if not tokens:
            return []
        spans = []
        if self._pieces and self._pieces[-1].role == ANSWERS and role != ANSWERS:
            spans += self._taken(self._num_tokens)
        self._pieces.append(_Piece(tuple(tokens), rows, role, seconds / len(tokens)))
        while self._num_tokens > self.max_tokens:
            spans += self._taken(self._border())
        return spans

    def flush(self) -> list[Span]:
        """The exchange is over: what is left of it."""
        return self._taken(self._num_tokens)

    def restart(self, at: Mark) -> None:
        """Forget what is not in a span yet, and go on from another place."""
        self.mark, self._pieces = at, []

    @property
    def position(self) -> int:
        """Tokens of the chat that were taken so far."""
        return self.mark.position + self._num_tokens

    @property
    def _num_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self._pieces)

    def _border(self) -> int:
        """Tokens of the next span, of which there are too many: up to the last border that fits."""
        tokens = [token for piece in self._pieces for token in piece.tokens][: self.max_tokens + 1]
        messages, at = [], 0
        for before, piece in zip(self._pieces, self._pieces[1:], strict=False):
            at += len(before.tokens)
            if piece.role != before.role and at <= self.max_tokens:
                messages.append(at)
        if messages:
            return messages[-1]
        names = [self._text.name(token) for token in tokens]
        words = [i for i in range(1, len(tokens)) if self._begins_word(tokens[i])]
        sentences = [
            i for i in range(1, len(tokens)) if _ends_sentence(names[i - 1], "" if i in words else names[i])
        ]
        return max(sentences, default=max(words, default=self.max_tokens))

    def _begins_word(self, token: int) -> bool:
        """Whether a blank stands before a token, as vocabularies write it."""
        written = self._text.tokenizer.convert_ids_to_tokens(token)
        return isinstance(written, str) and written[:1] in ("\u2581", "\u0120", " ")

    def _taken(self, num_tokens: int) -> list[Span]:
        """A span of the first tokens; none if they say nothing."""
        taken: list[_Piece] = []
        left = num_tokens
        while left:
            piece = self._pieces.pop(0)
            if len(piece.tokens) > left:
                piece, rest = piece.cut(left)
                self._pieces.insert(0, rest)
            taken.append(piece)
            left -= len(piece.tokens)
        tokens = tuple(token for piece in taken for token in piece.tokens)
        at, self.mark = self.mark, self.mark.behind(tokens)
        said = self._text.decode(tokens).strip()
        if not said:
            return []
        cost = sum(piece.seconds * len(piece.tokens) for piece in taken)
        kv = local_rows(tokens, _joined([piece.rows for piece in taken]), self._specs)
        return [Span(at, taken[0].role, said, kv, cost)]


def _ends_sentence(name: str, following: str) -> bool:
    """Whether a sentence ends between two tokens; a number goes on behind its point."""
    if "\n" in name:
        return not following.startswith("\n")
    said = name.rstrip(" \"')]\u201d\u2019")
    return said.endswith(_ENDS) and not following[:1].isdigit()


def _joined(pieces: Sequence[RawRows]) -> RawRows:
    if len(pieces) == 1:
        return pieces[0]
    return [
        (torch.cat([keys for keys, _ in layer], dim=1), torch.cat([values for _, values in layer], dim=1))
        for layer in zip(*pieces, strict=True)
    ]
