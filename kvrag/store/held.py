"""What a tier of memory holds within a budget, and who has to go when it is full."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvrag.segments import KV
from kvrag.store.eviction import Priority, Use


@dataclass(slots=True)
class Held:
    """One entry in memory.

    Attributes:
        kv: its rows.
        num_bytes: what it takes of the budget.
        tenant: whose it is.
        cost_seconds: what reading the text anew takes; 0 if unknown.
        created: seconds since 1970.
        expires: the same, after which it is a miss; None: never. For display, as clocks may jump.
        ends: when it becomes a miss, by `time.monotonic`.
        hits: loads so far.
        pinned: it is never evicted.
        number: by which it is evicted, the lowest first.
    """

    kv: KV
    num_bytes: int
    tenant: str
    cost_seconds: float
    created: float
    expires: float | None = None
    ends: float = math.inf
    hits: int = 0
    pinned: bool = False
    number: float = 0.0


class HeldEntries:
    """Entries by id, and per tenant a heap of their eviction numbers. Its owner has the lock.

    Nothing is searched for in a heap: an entry that is used, pinned or removed leaves its old number behind,
    which is recognised and dropped when it comes up.

    Args:
        budget_bytes: of all entries together.
        quotas: most bytes of a tenant; those without one have only the budget.
        priority: the rule of eviction.
    """

    def __init__(self, budget_bytes: int, quotas: Mapping[str, int], priority: Priority) -> None:
        self.entries: dict[str, Held] = {}
        self.num_bytes = 0
        self.evictions = 0
        self.evicted_bytes = 0
        self._budget, self._quotas, self._priority = budget_bytes, dict(quotas), priority
        self._taken: Counter[str] = Counter()  # bytes by tenant, also those only reserved
        self._loose: Counter[str] = Counter()  # of these, what eviction can free
        self._heaps: dict[str, list[tuple[float, int, str]]] = {}
        self._clock = 0
        self._floor = 0.0

    def reserve(self, tenant: str, num_bytes: int) -> bool:
        """Count bytes as taken, after evicting what stands in their way.

        Returns:
            False, and nothing is evicted, if they cannot fit beside what is pinned.
        """
        quota = self._quotas.get(tenant, self._budget)
        if self._taken[tenant] - self._loose[tenant] + num_bytes > quota:
            return False
        if self.num_bytes - self._loose.total() + num_bytes > self._budget:
            return False
        while self._taken[tenant] + num_bytes > quota:
            self._evict([tenant])
        while self.num_bytes + num_bytes > self._budget:
            self._evict(list(self._heaps))
        self._take(tenant, num_bytes)
        return True

    def release(self, tenant: str, num_bytes: int) -> None:
        """Give back reserved bytes that no entry came for."""
        self._take(tenant, -num_bytes)

    def add(self, key_id: str, held: Held) -> None:
        """Take an entry whose bytes are reserved."""
        self.entries[key_id] = held
        self._loose[held.tenant] += held.num_bytes
        self.use(key_id)

    def use(self, key_id: str, *, is_hit: bool = False) -> None:
        """Note a use, and give the entry the number that follows from it."""
        held = self.entries[key_id]
        held.hits += is_hit
        self._clock += 1
        held.number = self._priority(
            Use(held.hits + 1, max(1, held.num_bytes), held.cost_seconds, self._clock, self._floor)
        )
        self._push(key_id, held)

    def pin(self, key_id: str, pinned: bool) -> None:
        """Never evict the entry, or do so again."""
        held = self.entries[key_id]
        if held.pinned != pinned:
            held.pinned = pinned
            self._loose[held.tenant] += -held.num_bytes if pinned else held.num_bytes
            self._push(key_id, held)

    def remove(self, key_id: str) -> Held | None:
        """Let go of an entry, if it is there."""
        held = self.entries.pop(key_id, None)
        if held is not None:
            self._take(held.tenant, -held.num_bytes)
            if not held.pinned:
                self._loose[held.tenant] -= held.num_bytes
        return held

    def _take(self, tenant: str, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._taken[tenant] += num_bytes

    def _push(self, key_id: str, held: Held) -> None:
        if held.pinned:
            return
        heap = self._heaps.setdefault(held.tenant, [])
        heapq.heappush(heap, (held.number, self._clock, key_id))
        if len(heap) > 64 + 4 * len(self.entries):  # mostly leftovers
            heap[:] = {(n, c, k) for n, c, k in heap if self._is_current(n, k)}
            heapq.heapify(heap)

    def _is_current(self, number: float, key_id: str) -> bool:
        held = self.entries.get(key_id)
        return held is not None and not held.pinned and held.number == number

    def _evict(self, tenants: Sequence[str]) -> None:
        """Remove the entry of the lowest number among these tenants'; there is one."""
        tops = []
        for tenant in tenants:
            heap = self._heaps.get(tenant, [])
            while heap and not self._is_current(heap[0][0], heap[0][2]):
                heapq.heappop(heap)
            if heap:
                tops.append(heap[0])
        number, _, key_id = min(tops)
        self._floor = max(self._floor, number)
        self.evictions += 1
        self.evicted_bytes += self.entries[key_id].num_bytes
        self.remove(key_id)
