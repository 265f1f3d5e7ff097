"""Running heats: the question read over one group of documents at a time, no deeper than scores need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from kvrag.attention import Looking
from kvrag.compose import Arrangement, Unit
from kvrag.focus.focus import Focus
from kvrag.focus.heats import Heats, balanced
from kvrag.focus.policy import Policy
from kvrag.focus.pruning import Pruning
from kvrag.focus.scoring import among, depth_of
from kvrag.focus.together import groups_of
from kvrag.model import Model
from kvrag.prefill import Work, alone, read_first
from kvrag.room import place
from kvrag.worker import PAUSE

Numbers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rounds:
    """What heats left.

    Attributes:
        arrangement: the documents that came through, in retrieval order, one behind the other.
        policy: what is done with these.
        depth: layers that read the others.
        question_mass: for each of the others, its share of the question's attention in its last heat, mean
            over layers, heads and rows.
        heats: numbers of the documents of each heat, by round.
    """

    arrangement: Arrangement
    policy: Policy
    depth: int = 0
    question_mass: Mapping[int, float] = field(default_factory=dict)
    heats: tuple[tuple[Numbers, ...], ...] = ()

    @property
    def dropped_at(self) -> dict[int, int]:
        """For those who did not come through, the first layer that did not read them."""
        return dict.fromkeys(self.question_mass, self.depth)


def rounds(model: Model, arrangement: Arrangement, policy: Policy, capacity: int) -> Rounds:
    """Run all heats at once; see `running`."""
    return alone(model, running(model, arrangement, policy, capacity))


def running(model: Model, arrangement: Arrangement, policy: Policy, capacity: int) -> Work[Rounds]:
    """Rounds of heats until the documents left fit into the window; none if they do already.

    Documents of which no two fit together are left as they are, to share positions.

    Args:
        model: the decoder.
        arrangement: documents in retrieval order.
        policy: whose pruning may have heats.
        capacity: positions for documents.
    """
    found = Rounds(arrangement, policy)
    if policy.pruning is None or policy.pruning.heats is None:
        return found
    runner = _Runner(model, arrangement, policy, policy.pruning, policy.pruning.heats, capacity)
    room = capacity
    while runner.span(found.arrangement.units) > room:
        room = max(1, int(capacity * runner.heats.fill))
        entered = found
        found = yield from runner.round(found, room)
        if found is entered:
            break
    if not found.heats:
        return found
    scorer = among(policy.pruning.scorer, [unit.number for unit in found.arrangement.units])
    pruning = replace(policy.pruning, keep=runner.keep, scorer=scorer, heats=None)
    left = found.arrangement.packed()
    return replace(found, arrangement=left, policy=replace(policy, pruning=pruning))


@dataclass(frozen=True, slots=True)
class _Runner:
    """One request's heats."""

    model: Model
    arrangement: Arrangement
    policy: Policy
    pruning: Pruning
    heats: Heats
    capacity: int

    @property
    def keep(self) -> int:
        """Documents wanted in the end, or sources if their chunks stay together."""
        return self.pruning.num_kept(len(self.entrants(self.arrangement)))

    @property
    def depth(self) -> int:
        """Layers that a heat reads."""
        num_layers = self.model.num_layers
        depth = self.heats.depth or depth_of(self.heats.scorer or self.pruning.scorer)
        return min(num_layers, depth or self.pruning.first(num_layers))

    def entrants(self, arrangement: Arrangement) -> list[tuple[Unit, ...]]:
        """Documents that share their fate, in order of the first."""
        units = arrangement.units
        groups = groups_of([unit.source for unit in units], self.pruning.together)
        return [tuple(units[i] for i in group) for group in groups]

    def span(self, units: Sequence[Unit]) -> int:
        """Positions that documents take side by side."""
        return self.policy.placement.span([unit.length for unit in units])

    def round(self, entered: Rounds, room: int) -> Work[Rounds]:
        """One round over all that are left; what entered, if no heat has two who could be compared.

        Args:
            entered: after the rounds before.
            room: positions that those who come through may take.
        """
        entrants = self.entrants(entered.arrangement)

        def span(places: Sequence[int]) -> int:
            return self.span([unit for i in places for unit in entrants[i]])

        groups = balanced(len(entrants), span, max(1, int(self.capacity * self.heats.size)))
        if len(groups) == len(entrants):
            return entered
        share, left, masses = room / span(range(len(entrants))), set[int](), dict(entered.question_mass)
        heats = []
        for group in groups:
            numbers = sorted(unit.number for i in group for unit in entrants[i])
            yield PAUSE
            best_first, mass = self.heat(entered.arrangement.only(numbers))
            winners = self.heats.num_winners(len(group), self.keep, share)
            left |= {number for entrant in best_first[:winners] for number in entrant}
            masses |= mass
            heats.append(tuple(numbers))
        return Rounds(
            entered.arrangement.only(left),
            self.policy,
            self.depth,
            {number: mass for number, mass in masses.items() if number not in left},
            (*entered.heats, tuple(heats)),
        )

    def heat(self, group: Arrangement) -> tuple[list[Numbers], dict[int, float]]:
        """Read the question over one group.

        Returns:
            Numbers of the documents that share their fate, the best first and at equal scores the earlier
            ones; masses of all.
        """
        arranged, placed = place(group, self.policy.placement, self.capacity)
        numbers = [unit.number for unit in arranged.units]
        scorer = among(self.heats.scorer or self.pruning.scorer, numbers)
        focus = Focus(
            arranged,
            placed,
            placement=self.policy.placement,
            pruning=replace(self.pruning, keep=len(numbers), scorer=scorer, heats=None),
            capacity=self.capacity,
            num_layers=self.model.num_layers,
        )
        composed = arranged.composed()
        seen = read_first(
            self.model,
            focus,
            composed.tokens,
            composed.positions,
            num_layers=self.depth,
            looking=Looking(self.policy.group),
        )
        mass = torch.stack(seen.mass)[..., composed.question :].mean((0, 2)).tolist()
        documents = [s.document for s in composed.table]
        scores, entrants = focus.group_scores(), self.entrants(arranged)
        best_first = sorted(range(len(entrants)), key=lambda i: (-scores[i], i))
        return [tuple(unit.number for unit in entrants[i]) for i in best_first], {
            n: m for n, m in zip(documents, mass, strict=True) if n is not None
        }
