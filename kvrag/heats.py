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
from kvrag.model import Model
from kvrag.prefill import read_first
from kvrag.room import place

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
        found = runner.round(found, room)
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
        """Documents wanted in the end."""
        return self.pruning.num_kept(len(self.arrangement.units))

    @property
    def depth(self) -> int:
        """Layers that a heat reads."""
        num_layers = self.model.num_layers
        depth = self.heats.depth or depth_of(self.heats.scorer or self.pruning.scorer)
        return min(num_layers, depth or self.pruning.first(num_layers))

    def span(self, units: Sequence[Unit]) -> int:
        """Positions that documents take side by side."""
        return self.policy.placement.span([unit.length for unit in units])

    def round(self, entered: Rounds, room: int) -> Rounds:
        """One round over all that are left; what entered, if no heat has two who could be compared.

        Args:
            entered: after the rounds before.
            room: positions that those who come through may take.
        """
        units = entered.arrangement.units
        size = max(1, int(self.capacity * self.heats.size))
        groups = balanced(len(units), lambda places: self.span([units[i] for i in places]), size)
        if len(groups) == len(units):
            return entered
        share, left, masses = room / self.span(units), set[int](), dict(entered.question_mass)
        for group in groups:
            numbers = tuple(units[i].number for i in group)
            best_first, mass = self.heat(entered.arrangement.only(numbers))
            left |= set(best_first[: self.heats.num_winners(len(group), self.keep, share)])
            masses |= mass
        return Rounds(
            entered.arrangement.only(left),
            self.policy,
            self.depth,
            {number: mass for number, mass in masses.items() if number not in left},
            (*entered.heats, tuple(tuple(units[i].number for i in group) for group in groups)),
        )

    def heat(self, group: Arrangement) -> tuple[list[int], dict[int, float]]:
        """Read the question over one group.

        Returns:
            Numbers of the documents, the best first and at equal scores the earlier one; their masses.
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
        order = sorted(range(len(numbers)), key=lambda i: (-focus.scores[i], i))
        documents = [s.document for s in composed.table]
        return [numbers[i] for i in order], {
            n: m for n, m in zip(documents, mass, strict=True) if n is not None
        }
