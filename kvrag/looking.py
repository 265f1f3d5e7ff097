"""Reading a question over its documents under a policy: place, prune, mend, and say what was looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kvrag.attention import Fixed, Looking
from kvrag.compose import Arrangement, Composed
from kvrag.focus.focus import Focus, Staircase
from kvrag.focus.placement import Placed
from kvrag.focus.policy import Policy
from kvrag.focus.pruning import Pruning
from kvrag.focus.repair import Evidence, Repair
from kvrag.focus.risk import Risk, risk
from kvrag.fresh import FreshRows
from kvrag.heats import rounds
from kvrag.model import Model
from kvrag.prefill import Read, read_first, read_prompt
from kvrag.room import Room, place
from kvrag.segments import SegmentTable

Columns = Mapping[int, Mapping[int, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Look:
    """What reading a question gave.

    Attributes:
        read: logits of the last token, masses of the documents over the prompt's fresh rows.
        composed: what was read, last.
        fresh: its rows.
        tables: what the answer's tokens read: the survivors.
        everyone: all documents at their last places, for a second look.
        focus: the scores and survivors of the reading that pruned.
        columns: attention to single rows, by layer and document, where it was asked for.
        risk: how far the answer may be from the one of full attention.
        question_mass: attention mass of each document over the question's rows, mean over layers and heads,
            before documents were mended or read in full.
        recomputed: rows of documents that were read again for this answer.
        in_full: all documents were read anew because the risk was too high.
    """

    read: Read
    composed: Composed
    fresh: FreshRows
    tables: SegmentTable | Staircase
    everyone: SegmentTable
    focus: Focus
    columns: Columns
    risk: Risk
    question_mass: Mapping[int, float]
    recomputed: int = 0
    in_full: bool = False


def look(model: Model, arrangement: Arrangement, policy: Policy, *, max_new_tokens: int = 1) -> Look:
    """Read a question under a policy.

    Args:
        model: the decoder.
        arrangement: the prompt, documents in retrieval order.
        policy: what to do with them.
        max_new_tokens: positions to leave for the answer where documents have to share.

    Raises:
        ContextOverflow: question and prefix, or one document, do not fit into the positions.
    """
    room = Room.of(arrangement, policy.placement, model.max_length, max_new_tokens)
    heats = rounds(model, arrangement, policy, room.capacity)
    if not heats.heats:
        return _look(model, arrangement, policy, room)
    left = heats.arrangement
    room = Room.of(left, policy.placement, model.max_length, max_new_tokens)
    found = _look(model, left, heats.policy, room)
    found.focus.dropped_at.update(heats.dropped_at)
    return replace(found, question_mass={**heats.question_mass, **found.question_mass})


def _look(model: Model, arrangement: Arrangement, policy: Policy, room: Room) -> Look:
    """The same over documents that have been through their heats, or need none."""
    arranged, placed = place(arrangement, policy.placement, room.capacity)
    repair = policy.repair if arranged.units else None
    if repair is None or repair.needs_question or policy.pruning is not None:
        found = _read(model, arranged, placed, policy, room, policy.pruning, repair)
        if repair is not None:
            found = _mend(model, arranged, found, policy, room, repair)
    else:
        found = _read_mended(model, arranged, placed, policy, room, repair, {})
    if policy.max_risk is not None and found.risk.value > policy.max_risk and arrangement.units:
        return _in_full(model, arrangement, policy, room, found)
    return found


def _read(
    model: Model,
    arrangement: Arrangement,
    placed: Placed,
    policy: Policy,
    room: Room,
    pruning: Pruning | None,
    repair: Repair | None = None,
) -> Look:
    """Read the fresh tokens once."""
    focus = Focus(
        arrangement,
        placed,
        placement=policy.placement,
        pruning=pruning,
        capacity=room.capacity,
        num_layers=model.num_layers,
    )
    composed = arrangement.composed()
    layers = repair.column_layers(model.num_layers) if repair else frozenset()
    if policy.spans:
        layers |= frozenset(range(model.num_layers))
    from_row = composed.question
    if repair is not None and repair.by_last_row:
        from_row = len(composed.tokens) - 1
    fresh = FreshRows(model.num_layers)
    fresh.standing = {s.document: s.first_row for s in composed.table if s.document is not None and s.hidden}
    found = read_prompt(
        model,
        composed.table,
        composed.tokens,
        composed.positions,
        fresh,
        tables=focus,
        looking=Looking(policy.group, layers, from_row),
    )
    columns = {layer: _by_document(composed, values) for layer, values in found.columns.items()}
    documents = [i for i, s in enumerate(composed.table) if s.document is not None]
    last = found.focus[:, documents, -1].mean(0).tolist() if documents else []
    return Look(
        found,
        composed,
        fresh,
        focus.layers() if policy.per_layer else focus.final(),
        focus.everyone(),
        focus,
        columns,
        risk(last, found.logits[-1]),
        _question_mass(found, composed),
        arrangement.num_again,
    )


def _question_mass(found: Read, composed: Composed) -> dict[int, float]:
    rows = found.mass[..., composed.question :]
    return {
        s.document: float(rows[:, i].mean()) for i, s in enumerate(composed.table) if s.document is not None
    }


def _by_document(composed: Composed, columns: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    pairs = zip(composed.table, columns, strict=True)
    return {segment.document: c for segment, c in pairs if segment.document is not None}


def _mend(
    model: Model, arrangement: Arrangement, found: Look, policy: Policy, room: Room, repair: Repair
) -> Look:
    """Read the question again over the survivors, at their last places, with some of their rows anew."""
    focus = found.focus
    placed = {number: start for number, start in focus.starts().items() if number in focus.kept}
    kept = arrangement.only(focus.kept).placed(placed, arrangement.query).in_order()
    again = _read_mended(
        model,
        kept,
        Placed(tuple(unit.start for unit in kept.units), kept.query),
        policy,
        room,
        repair,
        found.columns,
    )
    return replace(again, focus=focus, columns=found.columns, question_mass=found.question_mass)


def _read_mended(
    model: Model,
    arrangement: Arrangement,
    placed: Placed,
    policy: Policy,
    room: Room,
    repair: Repair,
    columns: Columns,
) -> Look:
    """Choose rows, and read them and the question."""
    evidence = Evidence(lambda layer: deviations(model, arrangement, layer), columns)
    mended = arrangement.again(repair.rows(arrangement, evidence))
    return _read(model, mended, placed, policy, room, None)


def _in_full(model: Model, arrangement: Arrangement, policy: Policy, room: Room, found: Look) -> Look:
    """Read every document anew, if they all fit as the prompt has them; else what was found stays."""
    if sum(unit.length for unit in arrangement.units) > room.capacity:
        return found
    whole = arrangement.again({u.number: range(u.kv.num_tokens) for u in arrangement.units})
    placed = Placed(tuple(u.start for u in whole.units), whole.query)
    full = _read(model, whole, placed, replace(policy, group=None), room, None)
    return replace(full, risk=found.risk, question_mass=found.question_mass, in_full=True)


def deviations(model: Model, arrangement: Arrangement, layer: int) -> dict[int, torch.Tensor]:
    """How far the values of documents' rows change when they are read with everything before them.

    Args:
        model: the decoder.
        arrangement: documents in the order in which they see each other.
        layer: whose values are compared; layers behind it are not run.

    Returns:
        [n] float32 by document number: sum of squared differences over heads and dimensions.
    """
    everything = arrangement.again({u.number: range(u.kv.num_tokens) for u in arrangement.units})
    composed = everything.composed()
    num = composed.question
    first = read_first(
        model, Fixed(composed.table), composed.tokens[:num], composed.positions[:num], num_layers=layer + 1
    )
    values = first.fresh.values(layer)
    found = {}
    for segment in composed.table:
        if segment.document is None:
            continue
        rows = slice(segment.first_row, segment.first_row + segment.kv.num_tokens)
        change = values[:, rows].float() - segment.kv.layers[layer].values.float()
        found[segment.document] = change.square().sum((0, 2))
    return found
