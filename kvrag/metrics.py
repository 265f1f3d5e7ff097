"""Counters of one engine, and a way for Prometheus to collect them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from kvrag.errors import ConfigError, MissingExtra

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What has happened since the engine was made.

    Attributes:
        hits: documents of answers whose rows came from the store, by tier.
        misses: documents of answers that the store did not have.
        loaded_bytes: bytes of rows read from the store for answers, by tier.
        load_seconds: that this took, in all threads, by tier.
        decisions: documents that the store had, by what was chosen: "load" or "recompute".
        encoded_documents: that the model has read for answers.
        encoded_tokens: of those.
        encode_seconds: that this took.
        answers: complete.
        cancelled: answers that ended before.
        prefetch_started: documents that were read ahead.
        prefetch_used: times that one was handed over.
        prefetch_cancelled: documents given up before all of their layers were read.
        write_failures: entries that could not be written.
        quarantines: entries set aside because a check failed.
        evictions: entries erased to make room.
        evicted_bytes: of those.
        expired: misses of entries whose time to live was over.
        read_failures: reads that failed for other reasons than absence or damage, such as no network.
    """

    hits: Mapping[str, int] = field(default_factory=lambda: _NONE)
    misses: int = 0
    loaded_bytes: Mapping[str, int] = field(default_factory=lambda: _NONE)
    load_seconds: Mapping[str, float] = field(default_factory=lambda: _NONE)
    decisions: Mapping[str, int] = field(default_factory=lambda: _NONE)
    encoded_documents: int = 0
    encoded_tokens: int = 0
    encode_seconds: float = 0.0
    answers: int = 0
    cancelled: int = 0
    prefetch_started: int = 0
    prefetch_used: int = 0
    prefetch_cancelled: int = 0
    write_failures: int = 0
    quarantines: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    expired: int = 0
    read_failures: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The snapshot for JSON."""
        plain = {name: dict(v) if isinstance(v, Mapping) else v for name, v in _items(self)}
        return dict(sorted(plain.items()))


def _items(snapshot: Snapshot) -> Iterator[tuple[str, Any]]:
    for name in Snapshot.__dataclass_fields__:
        yield name, getattr(snapshot, name)


_LABELLED = ("hits", "loaded_bytes", "load_seconds", "decisions")
_OF_STORES = {"damaged": "quarantines"}


class Metrics:
    """Counts what any thread tells it."""

    def __init__(self) -> None:
        self._plain: Counter[str] = Counter()
        self._labelled: dict[str, dict[str, float]] = {name: {} for name in _LABELLED}
        self._seconds = 0.0
        self._lock = threading.Lock()

    def add(self, name: str, number: int = 1) -> None:
        """Count something that has no label, by the names of `Snapshot`."""
        with self._lock:
            self._plain[name] += number

    def loaded(self, tier: str, num_bytes: int, seconds: float) -> None:
        """Count a document that came from the store."""
        with self._lock:
            for name, number in (("hits", 1), ("loaded_bytes", num_bytes), ("load_seconds", seconds)):
                self._labelled[name][tier] = self._labelled[name].get(tier, 0) + number

    def decided(self, what: str) -> None:
        """Count a decision, "load" or "recompute"."""
        with self._lock:
            self._labelled["decisions"][what] = self._labelled["decisions"].get(what, 0) + 1

    def encoded(self, documents: int, tokens: int, seconds: float) -> None:
        """Count documents that the model has read."""
        with self._lock:
            self._plain.update(encoded_documents=documents, encoded_tokens=tokens)
            self._seconds += seconds

    def snapshot(self, of_stores: Mapping[str, int] | None = None) -> Snapshot:
        """All numbers at one moment.

        Args:
            of_stores: what the engine's store counts itself.
        """
        with self._lock:
            plain: dict[str, Any] = dict(self._plain)
            plain |= {name: MappingProxyType(dict(found)) for name, found in self._labelled.items()}
            plain["encode_seconds"] = self._seconds
        names = Snapshot.__dataclass_fields__
        for name, number in (of_stores or {}).items():
            known = _OF_STORES.get(name, name)
            if known in names:
                plain[known] = number
        return Snapshot(**plain)


class HasMetrics(Protocol):
    """An engine."""

    def metrics(self) -> Snapshot:
        """Its numbers now."""
        ...


_HELP: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "hits": ("document_hits", "Documents of answers that came from the store, by tier."),
        "misses": ("document_misses", "Documents of answers that the store did not have."),
        "loaded_bytes": ("loaded_bytes", "Bytes of rows read from the store, by tier."),
        "load_seconds": ("load_seconds", "Seconds spent on loading rows, by tier."),
        "decisions": ("load_decisions", "Documents of the store, by what was chosen."),
        "encoded_documents": ("encoded_documents", "Documents that the model has read for answers."),
        "encoded_tokens": ("encoded_tokens", "Tokens of those documents."),
        "encode_seconds": ("encode_seconds", "Seconds that reading them took."),
        "answers": ("answers", "Answers that were completed."),
        "cancelled": ("answers_cancelled", "Answers that ended before."),
        "prefetch_started": ("prefetch_started", "Documents that were read ahead."),
        "prefetch_used": ("prefetch_used", "Documents read ahead and handed over."),
        "prefetch_cancelled": ("prefetch_cancelled", "Documents whose reading ahead was given up."),
        "write_failures": ("store_write_failures", "Entries that could not be written."),
        "quarantines": ("store_quarantines", "Damaged entries that were set aside."),
        "evictions": ("store_evictions", "Entries erased to make room."),
        "evicted_bytes": ("store_evicted_bytes", "Bytes of those entries."),
        "expired": ("store_expired", "Misses of entries whose time to live was over."),
        "read_failures": ("store_read_failures", "Reads that failed, such as without a network."),
    }
)


class _Collector:
    """Reads a snapshot when Prometheus asks."""

    def __init__(self, engine: HasMetrics, family: Any) -> None:
        self._engine, self._family = engine, family

    def collect(self) -> Iterator[Any]:
        """A counter per number, `_total` behind its name as the exposition format wants it."""
        for name, value in _items(self._engine.metrics()):
            shown, help_text = _HELP[name]
            if isinstance(value, Mapping):
                label = "choice" if name == "decisions" else "tier"
                family = self._family(f"kvrag_{shown}", help_text, labels=[label])
                for key, number in sorted(value.items()):
                    family.add_metric([key], number)
                yield family
            else:
                yield self._family(f"kvrag_{shown}", help_text, value=value)


def prometheus(engine: HasMetrics, registry: Any | None = None) -> Any:
    """Let Prometheus collect an engine's numbers.

    Args:
        engine: what counts; held by the registry until the collector is unregistered there.
        registry: a `prometheus_client.CollectorRegistry`; None: the client's own, `REGISTRY`.

    Returns:
        The collector that was registered, for `registry.unregister`.

    Raises:
        MissingExtra: prometheus-client is not installed.
        ConfigError: the registry has an engine already.
    """
    try:
        from prometheus_client import REGISTRY  # noqa: PLC0415  # an extra
        from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("prometheus-client", "metrics") from error
    collector = _Collector(engine, CounterMetricFamily)
    try:
        (REGISTRY if registry is None else registry).register(collector)
    except ValueError as error:
        raise ConfigError(
            f"{error}; one registry takes one engine: give each a registry of its own"
        ) from error
    return collector
