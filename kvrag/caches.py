"""Prebuilt rows for texts: from the store where it has them, else read now and kept for the next time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kvrag.errors import CacheMiss, StoreWriteError
from kvrag.model import Model
from kvrag.prefill import encode
from kvrag.segments import KV
from kvrag.store.base import KVStore
from kvrag.store.key import EntryKey, Fingerprint

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """One text's rows, and whether they were there already."""

    kv: KV
    is_hit: bool


class Caches:
    """Reads through a store: a miss is encoded and put back.

    Only the thread that owns the model may call it.
    """

    def __init__(self, model: Model, store: KVStore | None, *, token_budget: int = 2048) -> None:
        """Serve one model from one store; None keeps nothing.

        Args:
            model: the decoder.
            store: where rows are kept.
            token_budget: most tokens per forward pass while encoding, padding included.
        """
        self.model = model
        self.store = store
        self.token_budget = token_budget
        self._prefixes: dict[Tokens, KV] = {}
        self._fingerprints: dict[Tokens, Fingerprint] = {}
        self._has_warned = False

    def fingerprint(self, prefix: Tokens) -> Fingerprint:
        """What entries behind a prefix depend on."""
        if prefix not in self._fingerprints:
            self._fingerprints[prefix] = self.model.fingerprint(prefix)
        return self._fingerprints[prefix]

    def prefix(self, tokens: Tokens) -> KV | None:
        """Rows of a prefix, kept in memory once read; None for an empty one."""
        if not tokens:
            return None
        if tokens not in self._prefixes:
            (self._prefixes[tokens],) = encode(self.model, [tokens], token_budget=self.token_budget)
        return self._prefixes[tokens]

    def documents(self, prefix: Tokens, texts: Sequence[Tokens]) -> list[Loaded]:
        """Rows of texts behind a prefix, in order; a text that comes twice is loaded once.

        Args:
            prefix: tokens that the texts are encoded behind.
            texts: tokens of each text.
        """
        fingerprint = self.fingerprint(prefix)
        found: dict[Tokens, Loaded] = {}
        for tokens in dict.fromkeys(texts):
            kv = self._get(EntryKey(fingerprint, tokens))
            if kv is not None:
                found[tokens] = Loaded(kv, is_hit=True)
        missing = [tokens for tokens in dict.fromkeys(texts) if tokens not in found]
        for kv in self.encode(prefix, missing):
            self._put(EntryKey(fingerprint, kv.tokens), kv)
            found[kv.tokens] = Loaded(kv, is_hit=False)
        return [found[tokens] for tokens in texts]

    def encode(self, prefix: Tokens, texts: Sequence[Tokens]) -> list[KV]:
        """Read texts behind a prefix, without looking at the store."""
        return encode(self.model, texts, self.prefix(prefix), token_budget=self.token_budget) if texts else []

    def _get(self, key: EntryKey) -> KV | None:
        if self.store is None:
            return None
        try:
            return self.store.get(key).to(self.model.device)
        except CacheMiss:
            return None

    def _put(self, key: EntryKey, kv: KV) -> None:
        if self.store is None:
            return
        try:
            self.store.put(key, kv)
        except StoreWriteError as error:
            if not self._has_warned:
                logger.warning("answers go on without keeping new caches: %s", error)
            self._has_warned = True
