"""The ways to remember that `benchmarks/memory.py` compares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from memory_parts.asking import Archive
from memory_parts.stack import Mending

from kvrag.memory.base import MemoryPolicy, Seen
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.salient import Salient
from kvrag.memory.window import Window

FULL, WINDOW, SALIENT, SLOW = "full", "window", "salient", "salient, slow"

# What comes back: nothing; what the search finds and the question looks at; the message that tells it.
NOTHING, FOUND, GIVEN = "nothing", "found", "given"


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy for any budget.

    Attributes:
        name: in tables.
        family: what it belongs to.
        policy: with a budget that is replaced.
        mend: see `memory_parts.stack.Stack`.
    """

    name: str
    family: str
    policy: MemoryPolicy
    mend: Mending | None = None

    def at(self, budget: int, sinks: int) -> MemoryPolicy:
        """The policy within a budget of tokens, the first of them the system message."""
        if isinstance(self.policy, Full):
            return self.policy
        policy: MemoryPolicy = replace(self.policy, budget=budget, sinks=sinks)  # type: ignore[type-var]
        return policy


def _at_random(seen: Seen) -> Seen:
    return Seen(torch.zeros_like(seen.slots), torch.rand_like(seen.fresh))


ENTRIES = (
    Entry(FULL, "reference", Full()),
    Entry(WINDOW, "StreamingLLM", Window(64)),
    Entry("cascade 2", "Cascading KV cache", Cascade(64, 2)),
    Entry("cascade 4", "Cascading KV cache", Cascade(64, 4)),
    Entry("cascade 8", "Cascading KV cache", Cascade(64, 8)),
    Entry("cascade 4, random scores", "control", Cascade(64, 4, beta=1.0), _at_random),
    Entry("ladder 1/2", "LaCache", Ladder(64, span=3)),
    Entry("ladder 1/3", "LaCache", Ladder(64, span=2)),
    Entry("ladder 2/4", "LaCache", Ladder(64, span=2, overlap=1)),
    Entry("combined 4, bonus 1", "ladder over cascade", LadderCascade(64, 4, bonus=1.0)),
    Entry("combined 4, bonus 1000", "ladder over cascade", LadderCascade(64, 4, bonus=1000.0)),
    Entry("combined 2, bonus 1", "ladder over cascade", LadderCascade(64, 2, bonus=1.0)),
    Entry(SALIENT, "ours", Salient(64, homogeneous=False)),
    Entry(SLOW, "ours", Salient(64, homogeneous=False, half_life=24.0)),
)
BY_NAME = {entry.name: entry for entry in ENTRIES}

# Those whose memories are given an archive, too; the others' differ by little.
ARCHIVED = (WINDOW, "cascade 2", "cascade 4", "cascade 8", "ladder 1/2", "combined 4, bonus 1", SALIENT)


def archives(room: int) -> dict[str, Archive | None]:
    """What may come back into so much room."""
    return {NOTHING: None, FOUND: Archive(room), GIVEN: Archive(room, gold=True)}
