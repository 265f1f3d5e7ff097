"""Load a document's rows or read it anew: what either takes, and which is faster.

The model of costs is plain. Loading takes, by tier, bytes / rate and a latency for every few entries that are
fetched side by side, and the link to the model's device on top. Reading n tokens behind m others takes

    linear * n + quadratic * ((m + n)^2 - m^2)

seconds. Either gives the same rows, so a choice changes how long an answer takes and nothing else: bit for
bit where the same texts are read in the same batches, else up to the order of sums, as with any miss; what a
codec rounds in the store is rounded alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from kvrag.errors import ConfigError
from kvrag.store.found import Place
from kvrag.store.together import THREADS
from kvrag.trace import Choice

Recompute = Literal["auto", "never", "always"]

_MARGIN = 0.9  # reading anew has to be this much faster,
_LEAST_SECONDS = 0.002  # and by this much: below it, it is not worth the model's time
_STEP = 0.2  # what an observation moves an average by,
_LARGEST = 4.0  # and how far off it is taken to be at most: a hiccup is not a trend
_SMALL = 1 << 18  # entries below this tell of latency, others of rate


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast a place gives rows.

    Attributes:
        bytes_per_second: of large entries.
        latency: seconds until an entry begins to come.
    """

    bytes_per_second: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            ConfigError: a number that no place has.
        """
        if not (self.bytes_per_second > 0 and math.isfinite(self.latency) and self.latency >= 0):
            raise ConfigError(f"{self}: expected bytes_per_second above 0 and latency of 0 or more")

    def seconds(self, num_bytes: int, entries: int = 1) -> float:
        """What entries of so many bytes together take."""
        rounds = -(-entries // THREADS)
        return rounds * self.latency + num_bytes / self.bytes_per_second

    def after(self, num_bytes: int, entries: int, seconds: float) -> Rate:
        """The running average with one more observation."""
        factor = _pull(seconds, self.seconds(num_bytes, entries))
        if num_bytes < _SMALL * entries:
            return replace(self, latency=self.latency * factor)
        return replace(self, bytes_per_second=self.bytes_per_second / factor)

    @classmethod
    def first(cls, num_bytes: int, entries: int, seconds: float) -> Rate:
        """What a single observation says: a tenth of it is taken to be latency, or all but a tenth."""
        seconds, is_small = max(seconds, 1e-6), num_bytes < _SMALL * entries
        waiting = (0.9 if is_small else 0.1) * seconds
        return cls(max(num_bytes, 1) / (seconds - waiting), waiting / -(-entries // THREADS))


@dataclass(frozen=True, slots=True)
class PrefillSpeed:
    """How fast a model reads, from what two lengths took.

    Attributes:
        short: tokens and seconds.
        long: tokens, more than those, and seconds.
    """

    short: tuple[int, float]
    long: tuple[int, float]

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ConfigError: not two lengths, or no time.
        """
        if not (0 < self.short[0] < self.long[0] and min(self.short[1], self.long[1]) > 0):
            raise ConfigError(f"{self}: expected two lengths, the short one first, and what they took")

    @property
    def linear(self) -> float:
        """Seconds per token."""
        return self._terms()[0]

    @property
    def quadratic(self) -> float:
        """Seconds per pair of tokens."""
        return self._terms()[1]

    def seconds(self, before: int, tokens: int) -> float:
        """What reading so many tokens behind others takes."""
        linear, quadratic = self._terms()
        return linear * tokens + quadratic * ((before + tokens) ** 2 - before**2)

    def after(self, before: int, tokens: int, seconds: float) -> PrefillSpeed:
        """The running average with one more observation; it moves the length that it is closer to."""
        factor = _pull(seconds, self.seconds(before, tokens))
        middle = math.sqrt(self.short[0] * self.long[0])
        name = "short" if tokens < middle else "long"
        length, known = self.short if name == "short" else self.long
        return replace(self, **{name: (length, known * factor)})

    def _terms(self) -> tuple[float, float]:
        (n, a), (m, b) = self.short, self.long
        quadratic = max(0.0, (b / m - a / n) / (m - n))
        if not quadratic:  # the short one took more per token: what is more was overhead
            return b / m, 0.0
        linear = a / n - quadratic * n
        return (linear, quadratic) if linear >= 0 else (0.0, b / m**2)


def _pull(seconds: float, expected: float) -> float:
    """What an average is multiplied by after an observation."""
    ratio = min(_LARGEST, max(1 / _LARGEST, max(seconds, 1e-9) / max(expected, 1e-9)))
    return float(ratio**_STEP)


@dataclass(frozen=True, slots=True)
class CostTable:
    """What things take on one machine, with one model and one store.

    Attributes:
        prefill: of the model; None: not known.
        tiers: rates by name; what is not here is not known.
        link: from main memory to the model's device; None: rows are used where they lie.
        token_bytes: bytes of rows per token as the store keeps them; 0: not known.
    """

    prefill: PrefillSpeed | None = None
    tiers: Mapping[str, Rate] = field(default_factory=lambda: MappingProxyType({}))
    link: Rate | None = None
    token_bytes: float = 0.0

    def load_seconds(self, wanted: Sequence[tuple[str, int]]) -> float | None:
        """What loading entries takes, given by tier and bytes; None: a tier is not known."""
        total = 0.0
        for tier in dict.fromkeys(name for name, _ in wanted):
            rate, sizes = self.tiers.get(tier), [size for name, size in wanted if name == tier]
            if rate is None:
                return None
            total += rate.seconds(sum(sizes), len(sizes))
        if self.link is not None:
            total += self.link.seconds(sum(size for _, size in wanted), len(wanted))
        return total

    def as_dict(self) -> dict[str, Any]:
        """The table for JSON."""
        link, prefill = self.link, self.prefill
        return {
            "prefill": None if prefill is None else [*prefill.short, *prefill.long],
            "tiers": {name: [r.bytes_per_second, r.latency] for name, r in sorted(self.tiers.items())},
            "link": None if link is None else [link.bytes_per_second, link.latency],
            "token_bytes": self.token_bytes,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CostTable:
        """The table of `as_dict`.

        Raises:
            ConfigError, KeyError, TypeError, ValueError: it is none.
        """
        prefill, link = raw["prefill"], raw["link"]
        if prefill is not None:
            n, a, m, b = prefill
            prefill = PrefillSpeed((int(n), float(a)), (int(m), float(b)))
        return cls(
            prefill,
            {str(name): Rate(*map(float, rate)) for name, rate in raw["tiers"].items()},
            None if link is None else Rate(*map(float, link)),
            float(raw["token_bytes"]),
        )


EncodeSeconds = Callable[[Sequence[int]], float]
"""What reading some of the documents anew takes, by their numbers; those that share runs share costs."""

_AT_HAND = Choice(False, "its rows are in memory, or on their way")
NO_SPEEDS = Choice(False, "speeds are not known yet")
_NEVER = Choice(False, "recompute='never'")
_ALWAYS = Choice(True, "recompute='always'")


def choose(
    table: CostTable, places: Sequence[Place], sizes: Sequence[int], encode_seconds: EncodeSeconds
) -> list[Choice]:
    """For each document of one answer that the store has: load it, or read it anew.

    Three plans are compared as a whole: load all, read all anew, and for each document what is faster for it
    alone. Anything but the first has to win clearly.

    Args:
        table: what things take.
        places: where each would come from.
        sizes: bytes of each.
        encode_seconds: what reading takes.
    """
    open_ = [i for i, place in enumerate(places) if not place.is_at_hand]
    choices = [_AT_HAND] * len(places)
    if not open_:
        return choices
    known = [i for i in open_ if table.prefill is not None and places[i].tier in table.tiers]
    for i in open_:
        choices[i] = NO_SPEEDS
    if not known:
        return choices

    def load(numbers: Sequence[int]) -> float:
        return table.load_seconds([(places[i].tier, sizes[i]) for i in numbers]) or 0.0

    loads = {i: load([i]) for i in known}
    anew = {i: encode_seconds([i]) for i in known}
    plans = ((), tuple(known), tuple(i for i in known if anew[i] < loads[i]))
    totals = [load([i for i in known if i not in plan]) + encode_seconds(plan) for plan in plans]
    best = min(range(len(plans)), key=totals.__getitem__)
    if totals[best] > _MARGIN * totals[0] or totals[0] - totals[best] < _LEAST_SECONDS:
        best = 0
    for i in known:
        is_anew = i in plans[best]
        choices[i] = Choice(
            is_anew, _reason(places[i], sizes[i], loads[i], anew[i], totals, best), loads[i], anew[i]
        )
    return choices


def clearly_loaded(table: CostTable, tiers: Sequence[str], fewest_tokens: int) -> Choice | None:
    """The choice for all documents, wherever among these tiers they are; None: it depends on them.

    Latency weighs most on the shortest document: where loading wins for that, it wins for every one, and for
    all of them together. So this takes microseconds.

    Args:
        table: what things take.
        tiers: that rows may have to be read from.
        fewest_tokens: of the shortest document.
    """
    if table.prefill is None or not table.token_bytes or any(tier not in table.tiers for tier in tiers):
        return None
    num_bytes, anew = int(fewest_tokens * table.token_bytes), table.prefill.linear * fewest_tokens
    slowest = max((table.load_seconds([(tier, num_bytes)]) or 0.0 for tier in tiers), default=0.0)
    if slowest > anew:
        return None
    return Choice(
        False,
        f"even of the shortest, {slowest * 1e3:.1f} ms to load and at least {anew * 1e3:.1f} ms to read anew",
    )


def _reason(place: Place, size: int, load: float, anew: float, totals: Sequence[float], best: int) -> str:
    return (
        f"{size / 1e6:.1f} MB from {place.tier}: {load * 1e3:.1f} ms to load, {anew * 1e3:.1f} ms to read "
        f"anew; all documents: {totals[0] * 1e3:.1f} ms if loaded, {totals[best] * 1e3:.1f} ms as chosen"
    )


def forced(recompute: Recompute) -> Choice | None:
    """A choice that nothing has to be known for; None: it depends."""
    return {"auto": None, "always": _ALWAYS, "never": _NEVER}[recompute]


def check_recompute(recompute: str) -> Recompute:
    """The setting, if it is one.

    Raises:
        ConfigError: it is none.
    """
    for known in get_args(Recompute):
        if recompute == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"recompute={recompute!r}: expected 'auto', 'never' or 'always'")
