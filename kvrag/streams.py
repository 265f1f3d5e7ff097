"""An answer as its caller reads it: pieces of text, or pieces with their tokens, as they are written."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from kvrag.answer import Answer, Piece
from kvrag.worker import Stream


class AnswerStream:
    """Text of an answer as it is written; iterate it, or iterate it with `async for`.

    `events` and `aevents` give the same with tokens and log-probabilities. `answer` is set once the text is
    complete. Leaving a `with` block, dropping the stream or calling `cancel` stops the answer.
    """

    def __init__(self, stream: Stream[Piece | Answer]) -> None:
        """Wrap the worker's stream."""
        self._stream = stream
        self.answer: Answer | None = None

    def events(self) -> Iterator[Piece]:
        """Pieces of text with their tokens, in order."""
        for event in self._stream:
            if isinstance(event, Answer):
                self.answer = event
            else:
                yield event

    async def aevents(self) -> AsyncGenerator[Piece, None]:
        """Pieces of text with their tokens, without blocking the event loop."""
        async with aclosing(self._stream.__aiter__()) as stream:
            async for event in stream:
                if isinstance(event, Answer):
                    self.answer = event
                else:
                    yield event

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, in order."""
        for piece in self.events():
            if piece.text:
                yield piece.text

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        """Pieces of text without blocking the event loop."""
        async with aclosing(self.aevents()) as pieces:
            async for piece in pieces:
                if piece.text:
                    yield piece.text

    def cancel(self) -> None:
        """Stop after the current token; a waiting iteration ends with `GenerationCancelled`."""
        self._stream.cancel()

    def __enter__(self) -> AnswerStream:
        """Cancel on exit."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the answer."""
        self.cancel()
