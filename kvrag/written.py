"""What an answer has written so far: text as it becomes certain, with the tokens that it is made of."""

from __future__ import annotations

from collections.abc import Sequence

from kvrag.answer import Piece, TokenLogprob
from kvrag.text import Decoding, Text


class Written:
    """Cuts tokens into pieces of text; a stop string ends it and is not part of it.

    Attributes:
        tokens: all of them, the ones of a stop string included.
        logprobs: for each token, if they were asked for; empty otherwise.
    """

    def __init__(self, text: Text, stop: Sequence[str] = ()) -> None:
        """Start an answer that ends before the first of `stop` appears."""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self._names, self._decoding = text, Decoding(text, stop)
        self._told = 0

    @property
    def text(self) -> str:
        """Everything that is certain."""
        return self._decoding.text

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._decoding.stopped

    @property
    def certain(self) -> tuple[int, int]:
        """How many tokens, from the first on, are all text of the answer, and how many characters of it."""
        return self._decoding.certain

    def add(self, token: int, ranked: Sequence[tuple[int, float]] = ()) -> Piece | None:
        """Take the next token.

        Args:
            token: its id.
            ranked: the token and the likeliest ones with their log-probabilities, see `kvrag.decode.Step`.

        Returns:
            Text that is now certain, if any is.
        """
        self.tokens.append(token)
        if ranked:
            (_, own), *best = ranked
            top = tuple(TokenLogprob(i, self._names.name(i), x) for i, x in best)
            self.logprobs.append(TokenLogprob(token, self._names.name(token), own, top))
        text = self._decoding.push(token)
        return self._piece(text, self._decoding.num_told) if text else None

    def finish(self) -> Piece | None:
        """The rest of text and tokens, once no token follows; None if there is none."""
        text = self._decoding.finish()
        return self._piece(text, len(self.tokens)) if text or self._told < len(self.tokens) else None

    def _piece(self, text: str, end: int) -> Piece:
        start, self._told = self._told, max(self._told, end)
        return Piece(text, tuple(self.tokens[start:end]), tuple(self.logprobs[start:end]))
