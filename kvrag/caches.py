"""Prebuilt rows for texts: from the store where it has them, else read now and kept for the next time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from kvrag.choosing import NO_STORE, Chooser, Pair, Tokens, Wanted, runs_of
from kvrag.costs import CostTable, check_recompute
from kvrag.encoding import Run, encode_runs, encoding_runs
from kvrag.errors import StoreWriteError
from kvrag.metrics import Metrics
from kvrag.model import Model
from kvrag.prefill import Read, Work, alone
from kvrag.segments import KV
from kvrag.speeds import Speeds
from kvrag.store.base import KVStore
from kvrag.store.codec import codec_named
from kvrag.store.found import Found, locate
from kvrag.store.key import EntryKey, Fingerprint
from kvrag.store.prefetch import Fetch, Prefetch
from kvrag.store.several import find_many
from kvrag.store.tenants import Tenant
from kvrag.store.tiers import TieredStore
from kvrag.trace import READ, RECOMPUTED, Choice, DocumentTrace, Trace

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_PREFIXES = 64


@dataclass(frozen=True, slots=True)
class Loaded:
    """One text's rows, and where they came from.

    Attributes:
        kv: the rows.
        is_hit: they came from the store; otherwise they were read for this answer.
        found: where in the store they were; None: they were read.
        choice: load or recompute.
        seconds: that reading them took, if they were read.
    """

    kv: KV
    is_hit: bool
    found: Found | None = None
    choice: Choice = NO_STORE
    seconds: float = 0.0

    def trace(self, key: str) -> DocumentTrace:
        """The same for people, so far: layers may still be read."""
        found, tokens = self.found, self.kv.num_tokens
        if found is None:
            origin = RECOMPUTED if self.choice.recompute else READ
            return DocumentTrace(key, tokens, origin, self.kv.num_bytes, self.seconds, False, self.choice)
        num_bytes, seconds = found.num_bytes, found.seconds_spent
        return DocumentTrace(key, tokens, found.tier, num_bytes, seconds, found.is_prefetched, self.choice)


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
        recompute: str = "auto",
        costs: CostTable | None = None,
    ) -> None:
        """Serve one model from one store; None keeps nothing.

        Args:
            model: the decoder.
            store: where rows are kept.
            codec: how they are written, by name.
            tenant: whose entries these are; None: nobody's in particular.
            token_budget: most tokens per forward pass while encoding, padding included.
            recompute: read texts anew that the store has: "auto" where that is faster, "never", "always".
            costs: what things take; None: found out.

        Raises:
            ConfigError: no codec has this name, or `recompute` is none of these.
        """
        self.model = model
        self.store = store
        self.reads = _ahead_of(store)
        self.speeds = Speeds(model, store, costs)
        self.metrics = Metrics()
        self.recompute = check_recompute(recompute)
        self.chooser = Chooser(self.reads, self.speeds, self.recompute, self.metrics)
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

    def use_codec(self, name: str) -> None:
        """Write rows by another codec from now on.

        Raises:
            ConfigError: no codec has this name.
        """
        self.codec = codec_named(name)
        self._fingerprints.clear()

    def has_prefix(self, tokens: Tokens) -> bool:
        """Whether rows of a prefix are in memory."""
        return tokens in self._prefixes

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
        pairs = list(zip(contexts or [()] * len(texts), texts, strict=True))
        keys = {pair: EntryKey(self.fingerprint(prefix + pair[0]), pair[1]) for pair in pairs}
        wanted = self.chooser.wanted(prefix, keys)
        found = self._loaded(wanted, by_layer=by_layer and self.model.device.type == "cpu")
        missing = [pair for pair in wanted.keys if pair not in found]
        encoding = self.encoding(prefix, [text for _, text in missing], [c for c, _ in missing])
        rows, seconds = yield from _timed(encoding)
        shares = self._count_encoded(prefix, missing, seconds)
        for pair, kv, share in zip(missing, rows, shares, strict=True):
            choice = self.chooser.settled(wanted, pair)
            if not choice.recompute:
                self._put(wanted.keys[pair], kv, share)
            found[pair] = Loaded(self._as_kept(kv), False, None, choice, share)
        return [found[pair] for pair in pairs]

    def prefetch(
        self, prefix: Tokens, texts: Sequence[Tokens], contexts: Sequence[Tokens], num_layers: int | None
    ) -> Fetch | None:
        """Begin to read texts that will be asked for, and would be loaded; may be called from any thread.

        Args:
            prefix: see `documents`.
            texts: see `documents`.
            contexts: see `documents`.
            num_layers: how many layers of each; None: all.
        """
        if self.reads is None or self.recompute == "always":
            return None
        behind = {context: self.fingerprint_behind(prefix + context) for context in set(contexts)}
        keys = {(c, t): EntryKey(behind[c], t) for c, t in zip(contexts, texts, strict=True)}
        return self.prefetch_entries(
            list(keys.values()), num_layers, self.chooser.chosen(prefix, keys, may_measure=False)[0]
        )

    def prefetch_entries(
        self, keys: Sequence[EntryKey], num_layers: int | None, choices: Sequence[Choice] | None = None
    ) -> Fetch | None:
        """The same for entries, without those that lie in memory or are not to be loaded."""
        if self.reads is None:
            return None
        places = [locate(self.reads, key) for key in keys]
        wanted = [
            key
            for number, (key, place) in enumerate(zip(keys, places, strict=True))
            if place is not None
            and not place.is_at_hand
            and not (choices is not None and choices[number].recompute)
        ]
        return self.reads.start(wanted, num_layers=num_layers) if wanted else None

    def trace(self, names: Sequence[str], loaded: Sequence[Loaded], prompt_tokens: int) -> Trace:
        """Where the documents of an answer came from, by their names in it."""
        speed = self.speeds.table.prefill
        traced = tuple(one.trace(name) for name, one in zip(names, loaded, strict=True))
        return Trace(traced, None if speed is None else speed.seconds(0, prompt_tokens))

    def settle(self, loaded: Sequence[Loaded]) -> None:
        """Count what loading the documents of an answer took, now that nothing more is read of them."""
        taken: dict[str, list[Found]] = {}
        # A text that stands in the prompt twice, or in pieces, was loaded once.
        for found in {id(one.found): one.found for one in loaded}.values():
            if found is None:
                continue
            self.metrics.loaded(found.tier, found.num_bytes, found.seconds_spent)
            if not found.is_prefetched and found.num_bytes:
                taken.setdefault(found.tier, []).append(found)
        share = self._stored_share(next(iter(taken.values()))[0].kv) if taken else 1.0
        for tier, some in taken.items():
            # They were opened side by side, and their layers touched one after the other.
            opening = max(found.seconds for found in some)
            touching = sum(found.seconds_spent - found.seconds for found in some)
            num_bytes = int(share * sum(found.num_bytes for found in some))
            self.speeds.note_load(tier, num_bytes, len(some), opening + touching)

    def close(self) -> None:
        """Keep what was learned of speeds, stop reading ahead, and close the store."""
        self.speeds.save()
        if self.reads is not None:
            self.reads.close()

    def _loaded(self, wanted: Wanted, *, by_layer: bool) -> dict[Pair, Loaded]:
        """What the store has of what is to be loaded."""
        if self.reads is None:
            self.metrics.add("misses", len(wanted.keys))
            return {}
        kept = find_many(self.reads, wanted.to_load, by_layer=by_layer)
        self.metrics.add("misses", len(wanted.to_load) - len(kept))
        found: dict[Pair, Loaded] = {}
        for pair, key in wanted.keys.items():
            if key.id in kept:
                self.chooser.see(key)
                self.metrics.decided("load")
                one = kept[key.id]
                found[pair] = Loaded(one.kv.to(self.model.device), True, one, wanted.choices[pair])
        return found

    def _count_encoded(self, prefix: Tokens, pairs: Sequence[Pair], seconds: float) -> list[float]:
        """Count texts that were read, and each one's share of the time."""
        total = sum(len(text) for _, text in pairs)
        if not total:
            return []
        self.metrics.encoded(len(pairs), total, seconds)
        speed, runs = self.speeds.table.prefill, runs_of([t for _, t in pairs], [c for c, _ in pairs])[0]
        if speed is not None:
            expected = sum(speed.seconds(len(prefix), len(run.tokens)) for run in runs)
            typical = sum(len(run.tokens) for run in runs) // len(runs)
            alone = speed.seconds(len(prefix), typical)
            self.speeds.note_prefill(len(prefix), typical, alone * seconds / max(expected, 1e-9))
        return [seconds * len(text) / total for _, text in pairs]

    def _stored_share(self, kv: KV) -> float:
        """What the codec leaves of a byte of rows."""
        share = 1.0
        if self.codec.name != "raw":
            first, spare = kv.layers[0], 256
            shape = (first.keys.shape[0], first.keys.shape[2], first.values.shape[2])
            stored = sum(part.num_bytes for part in self.codec.parts(shape, spare, first.keys.dtype))
            share = stored * kv.num_tokens / (spare * first.num_bytes)
        self.speeds.note_size(share * kv.num_bytes / kv.num_tokens)
        return share

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
        runs, places = runs_of(texts, contexts or [()] * len(texts))
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

    def _put(self, key: EntryKey, kv: KV, seconds: float) -> None:
        if self.reads is None:
            return
        try:
            self.reads.put(key, kv, cost_seconds=seconds)
            self.chooser.see(key)
        except StoreWriteError as error:
            if not self._has_warned:
                logger.warning("answers go on without keeping new caches: %s", error)
            self._has_warned = True


def _timed(work: Work[T]) -> Work[tuple[T, float]]:
    """The same work and its seconds, without those of others that have their turns in between."""
    seconds, outcome = 0.0, cast(Read, None)  # a generator is begun with None
    while True:
        start = time.perf_counter()
        try:
            ask = work.send(outcome)
        except StopIteration as end:
            return end.value, seconds + time.perf_counter() - start
        seconds += time.perf_counter() - start
        outcome = yield ask


def _ahead_of(store: KVStore | None) -> Prefetch | None:
    """The store, as one that can read ahead."""
    if store is None or isinstance(store, Prefetch):
        return store
    return Prefetch(store, traffic=store.traffic if isinstance(store, TieredStore) else None)


def _make_room(kept: dict[Tokens, Any]) -> None:
    """Forget the oldest: documents that are encoded behind others have a prefix each."""
    while len(kept) >= _MAX_PREFIXES:
        del kept[next(iter(kept))]
