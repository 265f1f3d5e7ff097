"""The rules of eviction that a trace is replayed under: the store's own, and others to compare them with."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from kvrag.segments import KV
from kvrag.store.eviction import EVICTION, Priority, Use
from kvrag.store.held import Held, HeldEntries

_NOTHING = KV((), ())


class Cache(Protocol):
    """A cache that is asked for documents."""

    def ask(self, document: int) -> bool:
        """Whether it has the document; it takes it in if not."""
        ...


class Tier:
    """The store's own eviction: the code that `MemoryTier` runs.

    Args:
        budget: bytes.
        sizes: of the documents.
        costs: seconds that reading each anew takes.
        priority: the rule.
    """

    def __init__(self, budget: int, sizes: Sequence[int], costs: Sequence[float], priority: Priority) -> None:
        self._held = HeldEntries(budget, {}, priority)
        self._sizes, self._costs = sizes, costs

    def ask(self, document: int) -> bool:
        """See `Cache`."""
        key, size = str(document), self._sizes[document]
        if key in self._held.entries:
            self._held.use(key, is_hit=True)
            return True
        if self._held.reserve("", size):
            self._held.add(key, Held(_NOTHING, size, "", self._costs[document], 0.0))
        return False


class TinyLfu:
    """Least recently used, with admission by remembered frequency (Einziger et al. 2017, TinyLFU, sec. 3).

    Who asks for room must have been asked for more often than those that would have to go. Counts are exact
    here, of all documents, and halved after ten times as many requests as the cache holds entries; a sketch
    approximates that.
    """

    def __init__(self, budget: int, sizes: Sequence[int]) -> None:
        self._budget, self._sizes = budget, sizes
        self._held: OrderedDict[int, None] = OrderedDict()
        self._counts: Counter[int] = Counter()
        self._num_bytes = self._asked = 0

    def ask(self, document: int) -> bool:
        """See `Cache`."""
        self._counts[document] += 1
        self._asked += 1
        if self._asked >= 10 * max(100, len(self._held)):
            self._asked = 0
            self._counts = Counter({d: count // 2 for d, count in self._counts.items() if count > 1})
        if document in self._held:
            self._held.move_to_end(document)
            return True
        size, going, freed = self._sizes[document], [], 0
        for victim in self._held:
            if self._num_bytes - freed + size <= self._budget:
                break
            if self._counts[victim] >= self._counts[document]:
                return False
            going.append(victim)
            freed += self._sizes[victim]
        if self._num_bytes - freed + size <= self._budget:
            for victim in going:
                del self._held[victim]
            self._held[document] = None
            self._num_bytes += size - freed
        return False


class S3Fifo:
    """Two queues and a memory of names (Yang et al. 2023, S3-FIFO, SOSP, sec. 4); a tenth is on trial."""

    def __init__(self, budget: int, sizes: Sequence[int]) -> None:
        self._budget, self._sizes = budget, sizes
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._uses: dict[int, int] = {}
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._small_bytes = self._main_bytes = 0

    def ask(self, document: int) -> bool:
        """See `Cache`."""
        if document in self._uses:
            self._uses[document] = min(3, self._uses[document] + 1)
            return True
        size = self._sizes[document]
        if size > self._budget:
            return False
        while self._small_bytes + self._main_bytes + size > self._budget:
            self._evict()
        if document in self._ghosts:
            del self._ghosts[document]
            self._main.append(document)
            self._main_bytes += size
        else:
            self._small.append(document)
            self._small_bytes += size
        self._uses[document] = 0
        return False

    def _evict(self) -> None:
        if self._small_bytes > self._budget // 10 or not self._main:
            document = self._small.popleft()
            self._small_bytes -= self._sizes[document]
            if self._uses[document] > 0:
                self._uses[document] = 0
                self._main.append(document)
                self._main_bytes += self._sizes[document]
                return
            self._ghosts[document] = None
            while len(self._ghosts) > max(16, len(self._main)):
                self._ghosts.popitem(last=False)
        else:
            document = self._main.popleft()
            if self._uses[document] > 0:
                self._uses[document] -= 1
                self._main.append(document)
                return
            self._main_bytes -= self._sizes[document]
        del self._uses[document]


class Foresight:
    """Who is asked for again last goes first (Belady 1966): about the best that any rule could do."""

    def __init__(self, budget: int, sizes: Sequence[int], requests: Sequence[int]) -> None:
        self._budget, self._sizes = budget, sizes
        self._next = [len(requests)] * len(requests)
        seen: dict[int, int] = {}
        for at in range(len(requests) - 1, -1, -1):
            self._next[at] = seen.get(requests[at], len(requests))
            seen[requests[at]] = at
        self._at = 0
        self._due: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []
        self._num_bytes = 0
        self._end = len(requests)

    def ask(self, document: int) -> bool:
        """See `Cache`."""
        due, size = self._next[self._at], self._sizes[document]
        self._at += 1
        is_hit = document in self._due
        if not is_hit:
            if due == self._end or size > self._budget:
                return False  # never again: not worth its room
            self._num_bytes += size
        self._due[document] = due
        heapq.heappush(self._heap, (-due, document))
        while self._num_bytes > self._budget:
            negative, victim = heapq.heappop(self._heap)
            if self._due.get(victim) == -negative:
                del self._due[victim]
                self._num_bytes -= self._sizes[victim]
        return is_hit


def per_request(use: Use) -> float:
    """GDSF with the same cost for every entry: for hits rather than for bytes."""
    return use.floor + use.hits / use.num_bytes


Make = Callable[[int, Sequence[int], Sequence[float], Sequence[int]], Cache]


def makers() -> dict[str, Make]:
    """Name -> what makes a cache of a budget, for sizes, costs and (where it looks ahead) the requests."""

    def tier(priority: Priority) -> Make:
        return lambda budget, sizes, costs, _: Tier(budget, sizes, costs, priority)

    made: dict[str, Make] = {name: tier(priority) for name, priority in sorted(EVICTION.items())}
    made["gdsf, equal costs"] = tier(per_request)
    made["TinyLFU admission, LRU"] = lambda budget, sizes, *_: TinyLfu(budget, sizes)
    made["S3-FIFO"] = lambda budget, sizes, *_: S3Fifo(budget, sizes)
    made["with foresight"] = lambda budget, sizes, _, requests: Foresight(budget, sizes, requests)
    return made
