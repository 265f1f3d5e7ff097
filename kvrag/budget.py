"""Which of the retrieved documents fit: each into a cache, all together into the model's window."""

from __future__ import annotations

from collections.abc import Sequence

from kvrag.encoder import DocumentEncoder
from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.prompt import RagPrompt

_RESERVE_SHARE = 8  # of the window, for instructions, question and history


class Budget:
    """Tokens that a prompt's documents may take.

    Args:
        engine: whose window and caches they are for.
        prefix: what documents are encoded behind: the form of the prompts, or text of a chat template.
        max_tokens: of all documents together; None: the window less the answer and an eighth for the rest of
            the prompt. Policies that let documents share positions can be given more than the window.
        answer_tokens: longest answer.

    Raises:
        ConfigError: nothing is left for documents.
    """

    def __init__(
        self,
        engine: Engine,
        prefix: str | RagPrompt = "",
        *,
        max_tokens: int | None = None,
        answer_tokens: int = 256,
    ) -> None:
        window = engine.model.max_length
        self.max_tokens = (
            window - answer_tokens - window // _RESERVE_SHARE if max_tokens is None else max_tokens
        )
        if self.max_tokens < 1:
            raise ConfigError(
                f"no tokens are left for documents: the window has {window}, the answer may take "
                f"{answer_tokens}; set max_tokens of the answer lower, or the budget yourself"
            )
        form = RagPrompt(prefix) if isinstance(prefix, str) else prefix
        self._encoder: DocumentEncoder = engine.encoder(form)

    def length(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._encoder.tokenize(text))

    def fitting(self, lengths: Sequence[int]) -> list[int]:
        """Numbers of the documents that fit, in order; the best come first and take what they need.

        Left out is what is empty, what is longer than the model can read behind the prefix, and what is too
        long for what those before it have left; a shorter one behind it may still fit.

        Args:
            lengths: tokens of each document, best first.
        """
        kept, left = [], self.max_tokens
        for number, length in enumerate(lengths):
            if 0 < length <= min(left, self._encoder.max_tokens):
                kept.append(number)
                left -= length
        return kept
