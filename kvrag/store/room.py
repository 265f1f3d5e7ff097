"""Keeping a store within its bytes: who goes when something new comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from kvrag.errors import ConfigError, EntryTooLarge, StoreWriteError, UploadsPending
from kvrag.store.index import EntryIndex, Victim


@dataclass(frozen=True, slots=True)
class Limits:
    """How many bytes of entries a store may hold.

    Attributes:
        budget_bytes: all of them; None: no limit.
        quotas: those of a tenant, by its name; tenants without one share the budget.
    """

    budget_bytes: int | None = None
    quotas: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = {"budget_bytes": self.budget_bytes} | {f"quotas[{t!r}]": n for t, n in self.quotas.items()}
        for name, value in limits.items():
            if value is not None and value <= 0:
                raise ConfigError(
                    f"{name}={value}: expected a positive number of bytes, or none for no limit"
                )

    def of(self, tenant: str) -> list[tuple[str | None, int]]:
        """(tenant or None for all, bytes) of every limit that an entry of this tenant counts for."""
        limits: list[tuple[str | None, int]] = []
        if tenant in self.quotas:
            limits.append((tenant, self.quotas[tenant]))
        if self.budget_bytes is not None:
            limits.append((None, self.budget_bytes))
        return limits

    def check_size(self, tenant: str, num_bytes: int) -> None:
        """Refuse what can never be kept.

        Raises:
            EntryTooLarge: the entry alone is larger than a limit.
        """
        for scope, limit in self.of(tenant):
            if num_bytes > limit:
                raise EntryTooLarge(
                    f"an entry of {num_bytes} bytes is larger than {_name(scope)} of {limit} bytes: raise "
                    "it, cut the text into smaller documents, or choose a codec of fewer bits"
                )

    def victims(
        self,
        index: EntryIndex,
        tenant: str,
        key_id: str,
        num_bytes: int,
        now: float,
        is_held: Callable[[str], bool],
    ) -> list[Victim]:
        """Entries that have to go so that one more fits; nothing has changed yet.

        Args:
            index: of the store.
            tenant: of the new entry.
            key_id: of the new entry; one of this id is replaced.
            num_bytes: of the new entry.
            now: seconds since 1970.
            is_held: tells entries that have to stay until they have been uploaded.

        Raises:
            StoreWriteError: it cannot fit, because too much is pinned.
            UploadsPending: it cannot fit yet.
        """
        replaced = index.info(key_id)
        chosen: dict[str, Victim] = {}
        for scope, limit in self.of(tenant):
            totals = index.totals(scope)
            pinned = totals.pinned_bytes - (replaced.num_bytes if replaced and replaced.pinned else 0)
            if pinned + num_bytes > limit:
                raise StoreWriteError(
                    f"an entry of {num_bytes} bytes does not fit: {pinned} of the {limit} bytes of "
                    f"{_name(scope)} are pinned; unpin or delete some entries, or raise it"
                )
            excess = totals.num_bytes + num_bytes - limit
            excess -= (replaced.num_bytes if replaced else 0) + sum(v.num_bytes for v in chosen.values())
            more = _cheapest(index, scope, excess, now, {key_id, *chosen}, is_held)
            if sum(v.num_bytes for v in more.values()) < excess:
                raise UploadsPending(
                    f"an entry of {num_bytes} bytes does not fit into {_name(scope)} of {limit} bytes: what "
                    "would have to go for it has not been uploaded yet. TieredStore.flush() uploads it, once "
                    "the bucket can be reached; else raise the limit, or DiskStore.release() what need not be"
                )
            chosen |= more
        return list(chosen.values())

    def surplus(self, index: EntryIndex, now: float, is_held: Callable[[str], bool]) -> list[Victim]:
        """Entries that are too many now, should a limit have been lowered; pinned and held ones stay."""
        chosen: dict[str, Victim] = {}
        for scope, limit in [*self.quotas.items(), (None, self.budget_bytes)]:
            if limit is not None:
                gone = 0 if scope is not None else sum(v.num_bytes for v in chosen.values())
                excess = index.totals(scope).num_bytes - gone - limit
                chosen |= _cheapest(index, scope, excess, now, set(chosen), is_held)
        return list(chosen.values())


def _cheapest(
    index: EntryIndex,
    scope: str | None,
    excess: int,
    now: float,
    spared: set[str],
    is_held: Callable[[str], bool],
) -> dict[str, Victim]:
    """Those of lowest priority until `excess` bytes are found, or there are no more."""
    chosen: dict[str, Victim] = {}
    if excess <= 0:
        return chosen
    index.use_policy()
    with closing(index.cheapest(scope, now)) as victims:
        for victim in victims:
            if victim.id not in spared and not is_held(victim.id):
                chosen[victim.id] = victim
                excess -= victim.num_bytes
                if excess <= 0:
                    break
    return chosen


def _name(scope: str | None) -> str:
    return "the store's budget" if scope is None else f"the quota of tenant {scope!r}"
