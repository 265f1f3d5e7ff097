"""Constraints at work: compiled for a tokenizer, they say before every token which ones can follow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvrag.constrain import Constraint, library
from kvrag.errors import ConfigError

_MAX_COMPILED = 64
_MARK = "\x02"  # in no text, so that it is merged with nothing


class Grammars:
    """Constraints compiled for one tokenizer; what was compiled is kept, the least used goes first.

    Only the thread that owns the model may call it.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Compile for a transformers tokenizer."""
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, ...], Any] = {}
        self._compiled: OrderedDict[tuple[Constraint, tuple[int, ...]], Any] = OrderedDict()

    def keeper(self, constraint: Constraint, ends: Sequence[int]) -> Keeper:
        """Start an answer that keeps to a constraint.

        Args:
            constraint: the form.
            ends: tokens that end an answer.

        Raises:
            ConfigError: it cannot be compiled for this tokenizer.
            MissingExtra: llguidance is not installed.
        """
        key = (constraint, tuple(ends))
        if key not in self._compiled:
            made = library().LLMatcher(self._vocabulary(key[1]), constraint.grammar, log_level=0)
            if made.is_error():
                raise ConfigError(f"the constraint cannot be kept to: {' '.join(made.get_error().split())}")
            self._compiled[key] = made
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return Keeper(self._compiled[key].deep_copy())

    def _vocabulary(self, ends: tuple[int, ...]) -> Any:
        """The tokenizer as llguidance sees it; takes about a second for a large one."""
        if ends not in self._known:
            self._known[ends] = _vocabulary(self._tokenizer, ends)
        return self._known[ends]


class _Spelling:
    """A tokenizer that takes the names of special tokens for text.

    llguidance tokenises what has to follow. The tokenizer's own way makes `</s>` in a text the end mark, and
    some put a blank before every text: theirs are tokenised behind a mark, which is cut off.
    """

    def __init__(self, backend: Any, known: Any, ends: Sequence[int]) -> None:
        """Wrap a tokenizer of the tokenizers library.

        Args:
            backend: the tokenizer; copied.
            known: the same as llguidance reads it.
            ends: tokens that end an answer.
        """
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self.eos_token_id, self.bos_token_id = (ends or [known.eos_token])[0], None
        self.tokens = [known.decode_bytes([i]) for i in range(known.vocab_size)]
        self.special_token_ids = [i for i in range(known.vocab_size) if known.is_special_token(i)]
        self._mark: list[int] = []
        if b"".join(self.tokens[i] for i in self("a")) != b"a":
            self._mark = self._encode(_MARK)

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text."""
        ids = self._encode(_MARK + text if self._mark else text)
        return ids[len(self._mark) :]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def _vocabulary(tokenizer: Any, ends: Sequence[int]) -> Any:
    """A tokenizer in llguidance's form."""
    made, backend = library(), getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError("constrained answers need a model with a fast tokenizer (tokenizer.json)")
    given = list(ends) or None
    try:
        spelling = _Spelling(backend, made.LLTokenizer(backend.to_str(), eos_token=given), ends)
        return made.LLTokenizer(made.TokenizerWrapper(spelling), eos_token=given)
    except ValueError as error:
        raise ConfigError(f"this tokenizer cannot keep to a grammar: {error}") from error


class Keeper:
    """Keeps one answer to its constraint."""

    def __init__(self, matcher: Any) -> None:
        """Start with a matcher of its own."""
        self._matcher = matcher

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits in which only tokens that can follow are possible.

        Args:
            logits: [1, V]; not modified.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._refuse_failure()
        allowed = torch.zeros(logits.shape[-1], dtype=torch.bool)
        known = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()[: len(allowed)]
        allowed[: len(known)] = known
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def take(self, token: int) -> None:
        """Go on behind a token."""
        self._matcher.consume_token(token)
        self._refuse_failure()

    @property
    def is_complete(self) -> bool:
        """Nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def _refuse_failure(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise ConfigError(f"the constraint is too much to be kept to: {reason}")
