"""What a corpus needs of an engine: texts as tokens, and their rows behind one prefix."""

from __future__ import annotations

from collections.abc import Sequence

from kvrag.caches import Caches
from kvrag.errors import DocumentTooLong, EmptyDocument
from kvrag.prompt import RagPrompt
from kvrag.segments import KV
from kvrag.store.key import Fingerprint
from kvrag.text import joined_tokens
from kvrag.worker import Worker


class DocumentEncoder:
    """Builds caches of texts behind one prefix, on the engine's thread."""

    def __init__(self, caches: Caches, worker: Worker, prompt: RagPrompt) -> None:
        """Encode for prompts of one form."""
        self._caches = caches
        self._worker = worker
        self.prompt = prompt
        self._prefix = caches.model.text.tokenize(prompt.prefix, first=not prompt.is_rendered)
        self.fingerprint: Fingerprint = caches.fingerprint(self._prefix)

    @property
    def max_tokens(self) -> int:
        """Longest text: the model's window less the prefix."""
        return self._caches.model.max_length - len(self._prefix)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Tokens of a text as they will stand in a prompt."""
        return self._caches.model.text.tokenize(text)

    def context(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Tokens of texts as they stand between prefix and a document in a prompt, in this order."""
        return joined_tokens(self._caches.model.text, self.prompt.before(texts))

    def fingerprint_behind(self, context: tuple[int, ...]) -> Fingerprint:
        """What entries depend on that are encoded behind prefix and context."""
        return self._caches.fingerprint_behind(self._prefix + context) if context else self.fingerprint

    def encode(self, texts: Sequence[tuple[int, ...]]) -> list[KV]:
        """Rows of texts given as tokens, in order.

        Raises:
            EmptyDocument: a text without tokens.
            DocumentTooLong: more than `max_tokens`.
        """
        return self.encode_behind(texts, [()] * len(texts))

    def encode_behind(
        self, texts: Sequence[tuple[int, ...]], contexts: Sequence[tuple[int, ...]]
    ) -> list[KV]:
        """Rows of texts, each behind the prefix and tokens of its own, in order.

        Raises:
            EmptyDocument: a text without tokens.
            DocumentTooLong: text and context together have more than `max_tokens`.
        """
        for i, (tokens, context) in enumerate(zip(texts, contexts, strict=True)):
            if not tokens:
                raise EmptyDocument(f"text {i} has no tokens; leave it out")
            if len(context) + len(tokens) > self.max_tokens:
                raise DocumentTooLong(
                    f"text {i} has {len(tokens)} tokens{f' behind {len(context)}' if context else ''} and "
                    f"{self.max_tokens} fit behind the prefix; split it"
                )
        return self._worker.do(lambda: self._caches.encoding(self._prefix, texts, contexts))
