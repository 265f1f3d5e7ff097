"""For each text of an answer that the store may have: load it, or read it anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvrag.costs import NO_SPEEDS, Recompute, choose, clearly_loaded, forced
from kvrag.encoding import Run
from kvrag.metrics import Metrics
from kvrag.speeds import Speeds
from kvrag.store.base import KVStore
from kvrag.store.found import Place, locate, tiers_of
from kvrag.store.key import EntryKey
from kvrag.trace import Choice

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]
"""What a text is encoded behind, beside the prefix, and its own tokens."""

NO_STORE = Choice(False, "there is no store")
_ABSENT = Choice(False, "the store does not have it")
_MAX_SEEN = 1 << 16


@dataclass(frozen=True, slots=True)
class Wanted:
    """Texts of one answer, each once.

    Attributes:
        keys: of their entries.
        choices: load or recompute.
        presumed: those that are recomputed although nobody has looked if the store has them.
    """

    keys: dict[Pair, EntryKey]
    choices: dict[Pair, Choice] = field(default_factory=dict)
    presumed: frozenset[Pair] = frozenset()

    @property
    def to_load(self) -> list[EntryKey]:
        """Those to ask the store for."""
        return [key for pair, key in self.keys.items() if not self.choices[pair].recompute]


class Chooser:
    """Decides by what things take, and counts what it has decided.

    Args:
        store: what texts would be loaded from; None: nothing is.
        speeds: what things take.
        recompute: "auto", or one thing always.
        metrics: where decisions are counted.
    """

    def __init__(self, store: KVStore | None, speeds: Speeds, recompute: Recompute, metrics: Metrics) -> None:
        self._store, self._speeds, self._recompute, self._metrics = store, speeds, recompute, metrics
        self._seen: dict[str, None] = {}

    def wanted(self, prefix: Tokens, keys: dict[Pair, EntryKey]) -> Wanted:
        """What an answer wants, and how it is to get it; on the thread that owns the model."""
        if self._store is None:
            return Wanted(keys, dict.fromkeys(keys, NO_STORE))
        for_all = self._for_all(keys)
        if for_all is not None:
            return Wanted(keys, dict.fromkeys(keys, for_all))
        choices, places = self.chosen(prefix, keys, may_measure=True)
        presumed = {
            pair
            for pair, choice, place in zip(keys, choices, places, strict=True)
            if choice.recompute and not (place is not None and place.is_certain)
        }
        return Wanted(keys, dict(zip(keys, choices, strict=True)), frozenset(presumed))

    def _for_all(self, keys: Mapping[Pair, EntryKey]) -> Choice | None:
        """The choice for all, if none has to be looked for to know it."""
        if self._recompute == "never":
            return forced("never")
        tiers, table = tiers_of(self._store), self._speeds.table
        if self._recompute == "always" or tiers is None or not keys:
            return None
        lengths = [len(text) for _, text in keys]
        if table.prefill is not None:
            return clearly_loaded(table, tiers, min(lengths))
        sizes = [int(length * table.token_bytes) for length in lengths]
        if any(self._speeds.are_wanted([Place(tier)] * len(sizes), sizes) for tier in tiers):
            return None
        return NO_SPEEDS if table.token_bytes else None

    def chosen(
        self, prefix: Tokens, keys: Mapping[Pair, EntryKey], *, may_measure: bool
    ) -> tuple[list[Choice], list[Place | None]]:
        """Load or recompute each, and where it is; what is not known is measured if it may be."""
        assert self._store is not None
        places = [locate(self._store, key) for key in keys.values()]
        choices = [_ABSENT] * len(places)
        there = [i for i, place in enumerate(places) if place is not None]
        same = forced(self._recompute)
        if same is not None:
            chosen = [same] * len(there)
        else:
            pairs = list(keys)
            some = [place for place in places if place is not None]
            sizes = [self._size(place, pairs[i]) for i, place in zip(there, some, strict=True)]
            if may_measure and self._speeds.are_wanted(some, sizes):
                self._speeds.measure()

            def encode_seconds(numbers: Sequence[int]) -> float:
                return self.encode_seconds(prefix, [pairs[there[n]] for n in numbers])

            chosen = choose(self._speeds.table, some, sizes, encode_seconds)
        for i, choice in zip(there, chosen, strict=True):
            choices[i] = choice
        return choices, places

    def _size(self, place: Place, pair: Pair) -> int:
        """Bytes of a text's rows in the store."""
        if place.num_bytes is not None:
            return place.num_bytes
        return int(len(pair[1]) * self._speeds.table.token_bytes)

    def encode_seconds(self, prefix: Tokens, pairs: Sequence[Pair]) -> float:
        """What reading these anew is expected to take, those in each other's contexts in one go."""
        speed = self._speeds.table.prefill
        if speed is None or not pairs:
            return 0.0
        runs, _ = runs_of([text for _, text in pairs], [context for context, _ in pairs])
        return sum(speed.seconds(len(prefix), len(run.tokens)) for run in runs)

    def settled(self, wanted: Wanted, pair: Pair) -> Choice:
        """The choice for a text that was read, once it is certain whether the store has it; counted then."""
        choice = wanted.choices[pair]
        if not choice.recompute:
            return choice if self._store is None else _ABSENT
        if pair in wanted.presumed and not self._is_there(wanted.keys[pair]):
            self._metrics.add("misses")
            return _ABSENT
        self._metrics.decided("recompute")
        return choice

    def _is_there(self, key: EntryKey) -> bool:
        """Whether the store has an entry, asked once."""
        assert self._store is not None
        if key.id not in self._seen:
            if key.id not in self._store:
                return False
            self.see(key)
        return True

    def see(self, key: EntryKey) -> None:
        """Remember that the store has an entry."""
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen[key.id] = None


def runs_of(texts: Sequence[Tokens], contexts: Sequence[Tokens]) -> tuple[list[Run], list[tuple[int, int]]]:
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
