"""Prebuilt rows for texts: from the store where it has them, else read now and kept for the next time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvrag.errors import StoreWriteError
from kvrag.model import Model
from kvrag.prefill import Run, Work, alone, encode_runs, encoding_runs
from kvrag.segments import KV
from kvrag.store.base import KVStore
from kvrag.store.codec import codec_named
from kvrag.store.key import EntryKey, Fingerprint
from kvrag.store.several import get_many
from kvrag.store.tenants import Tenant

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]
_MAX_PREFIXES = 64


@dataclass(frozen=True, slots=True)
class Loaded:
    """One text's rows, and whether they were there already."""

    kv: KV
    is_hit: bool


class Caches:
    """Reads through a store: a miss is encoded and put back.

    Only the thread that owns the model may call it.
    """

    def __init__(
        self,
        model: Model,
        store: KVStore | None,
        *,
        codec: str = "raw",
        tenant: Tenant | None = None,
        token_budget: int = 2048,
    ) -> None:
        """Serve one model from one store; None keeps nothing.

        Args:
            model: the decoder.
            store: where rows are kept.
            codec: how they are written, by name.
            tenant: whose entries these are; None: nobody's in particular.
            token_budget: most tokens per forward pass while encoding, padding included.

        Raises:
            ConfigError: no codec has this name.
        """
        self.model = model
        self.store = store
        self.codec = codec_named(codec)
        self.tenant = tenant
        self.token_budget = token_budget
        self._prefixes: dict[Tokens, KV] = {}
        self._fingerprints: dict[Tokens, Fingerprint] = {}
        self._has_warned = False

    def fingerprint(self, prefix: Tokens) -> Fingerprint:
        """What entries behind a prefix depend on."""
        if prefix not in self._fingerprints:
            _make_room(self._fingerprints)
            self._fingerprints[prefix] = self.fingerprint_behind(prefix)
        return self._fingerprints[prefix]

    def fingerprint_behind(self, prefix: Tokens) -> Fingerprint:
        """The same, not remembered: may be called from any thread."""
        return self.model.fingerprint(prefix, codec=self.codec.name, tenant=self.tenant)

    def prefix(self, tokens: Tokens) -> KV | None:
        """Rows of a prefix, kept in memory once read; None for an empty one."""
        if not tokens:
            return None
        if tokens in self._prefixes:
            return self._prefixes[tokens]
        run = Run(tokens, ((0, len(tokens)),))
        ((kv,),) = encode_runs(self.model, [run], token_budget=self.token_budget)
        _make_room(self._prefixes)
        self._prefixes[tokens] = kv
        return kv

    def documents(
        self,
        prefix: Tokens,
        texts: Sequence[Tokens],
        *,
        contexts: Sequence[Tokens] | None = None,
        by_layer: bool = False,
    ) -> list[Loaded]:
        """Load texts at once; see `loading`."""
        return alone(self.model, self.loading(prefix, texts, contexts=contexts, by_layer=by_layer))

    def loading(
        self,
        prefix: Tokens,
        texts: Sequence[Tokens],
        *,
        contexts: Sequence[Tokens] | None = None,
        by_layer: bool = False,
    ) -> Work[list[Loaded]]:
        """Rows of texts behind a prefix, in order; a text that comes twice is loaded once.

        Args:
            prefix: tokens that the texts are encoded behind.
            texts: tokens of each text.
            contexts: for each text, tokens that it is encoded behind beside the prefix; None: nothing.
            by_layer: load and prove each layer when it is first read; damage then raises `CacheMiss` there.
        """
        wanted = list(zip(contexts or [()] * len(texts), texts, strict=True))
        found: dict[tuple[Tokens, Tokens], Loaded] = {}
        keys = {pair: EntryKey(self.fingerprint(prefix + pair[0]), pair[1]) for pair in wanted}
        kept = {} if self.store is None else get_many(self.store, list(keys.values()), by_layer=by_layer)
        for pair, key in keys.items():
            if key.id in kept:
                found[pair] = Loaded(kept[key.id].to(self.model.device), is_hit=True)
        missing = [pair for pair in dict.fromkeys(wanted) if pair not in found]
        rows = yield from self.encoding(prefix, [text for _, text in missing], [c for c, _ in missing])
        for (context, tokens), kv in zip(missing, rows, strict=True):
            self._put(EntryKey(self.fingerprint(prefix + context), tokens), kv)
            found[context, tokens] = Loaded(self._as_kept(kv), is_hit=False)
        return [found[pair] for pair in wanted]

    def encode(
        self, prefix: Tokens, texts: Sequence[Tokens], contexts: Sequence[Tokens] | None = None
    ) -> list[KV]:
        """Read texts at once; see `encoding`."""
        return alone(self.model, self.encoding(prefix, texts, contexts))

    def encoding(
        self, prefix: Tokens, texts: Sequence[Tokens], contexts: Sequence[Tokens] | None = None
    ) -> Work[list[KV]]:
        """Read texts behind a prefix, without looking at the store.

        Texts that stand in each other's contexts, like the parts of one document, are read in one go: each
        token once.

        Args:
            prefix: tokens that the texts are encoded behind; its rows are remembered.
            texts: tokens of each text.
            contexts: for each text, tokens that it is encoded behind beside the prefix; None: nothing. Their
                rows are not remembered: they tell of texts that may be deleted any time.
        """
        if not texts:
            return []
        runs, places = _runs(texts, contexts or [()] * len(texts))
        before = self.prefix(prefix)
        rows = yield from encoding_runs(self.model, runs, before, token_budget=self.token_budget)
        return [rows[run][number] for run, number in places]

    def _as_kept(self, kv: KV) -> KV:
        """The rows that the next request will find, so that a miss and a hit answer alike."""
        if self.store is None or self.codec.name == "raw":
            return kv
        pairs = zip(kv.layers, (spec.rotation for spec in self.model.specs), strict=True)
        return KV(
            kv.tokens,
            tuple(self.codec.unpack(self.codec.pack(x, turn), x.keys.dtype, turn) for x, turn in pairs),
        )

    def _put(self, key: EntryKey, kv: KV) -> None:
        if self.store is None:
            return
        try:
            self.store.put(key, kv)
        except StoreWriteError as error:
            if not self._has_warned:
                logger.warning("answers go on without keeping new caches: %s", error)
            self._has_warned = True


def _runs(texts: Sequence[Tokens], contexts: Sequence[Tokens]) -> tuple[list[Run], list[tuple[int, int]]]:
    """As few runs as there can be, and for each text its run and its number among that run's texts."""
    whole = [(*context, *text) for context, text in zip(contexts, texts, strict=True)]
    runs: list[Run] = []
    places: dict[int, tuple[int, int]] = {}
    # From behind: what begins with certain tokens comes right after these tokens themselves.
    for i in sorted(range(len(whole)), key=whole.__getitem__, reverse=True):
        end = len(whole[i])
        if not runs or runs[-1].tokens[:end] != whole[i]:
            runs.append(Run(whole[i], ()))
        places[i] = (len(runs) - 1, len(runs[-1].texts))
        runs[-1] = replace(runs[-1], texts=(*runs[-1].texts, (len(contexts[i]), end)))
    return runs, [places[i] for i in range(len(texts))]


def _make_room(kept: dict[Tokens, Any]) -> None:
    """Forget the oldest: documents that are encoded behind others have a prefix each."""
    while len(kept) >= _MAX_PREFIXES:
        del kept[next(iter(kept))]
