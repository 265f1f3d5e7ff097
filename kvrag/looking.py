"""Reading a question over its documents under a policy: place, prune, mend, and say what was looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvrag.attention import Fixed, Looking
from kvrag.citations import Seen
from kvrag.compose import Arrangement, Composed
from kvrag.errors import ConfigError
from kvrag.focus.focus import Focus, Staircase
from kvrag.focus.placement import Placed
from kvrag.focus.policy import Policy
from kvrag.focus.pruning import Pruning
from kvrag.focus.repair import Evidence, Repair
from kvrag.focus.risk import Risk, risk
from kvrag.fresh import FreshRows
from kvrag.heats import running
from kvrag.model import Model
from kvrag.prefill import STRIDE, Read, Work, alone, read_first, reading_prompt
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
        layers: for each layer, what it made of the documents it read, by number; of the same reading.
        question_at: position of the first token behind the documents, in that reading.
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
    layers: Sequence[Mapping[int, Seen]]
    question_at: int
    recomputed: int = 0
    in_full: bool = False


def look(model: Model, arrangement: Arrangement, policy: Policy, *, max_new_tokens: int = 1) -> Look:
    """Read a question at once; see `looking`."""
    return alone(model, looking(model, arrangement, policy, max_new_tokens=max_new_tokens))


def looking(
    model: Model,
    arrangement: Arrangement,
    policy: Policy,
    *,
    max_new_tokens: int = 1,
    stride: int = STRIDE,
) -> Work[Look]:
    """Read a question under a policy.

    Args:
        model: the decoder.
        arrangement: the prompt, documents in retrieval order.
        policy: what to do with them.
        max_new_tokens: positions to leave for the answer where documents have to share.
        stride: most fresh tokens of a pass, where nothing hangs on what they all look at.

    Raises:
        ContextOverflow: question and prefix, or one document, do not fit into the positions.
        ConfigError: the pruning goes by the search's similarities, too, and nobody gave them.
    """
    if policy.pruning is not None and policy.pruning.nearness:
        raise ConfigError(
            f"nearness={policy.pruning.nearness} needs each document's similarity to the question: kvrag.ask "
            "knows them; for a prompt of your own, give pruning.nearer(similarities)"
        )
    room = Room.of(arrangement, policy.placement, model.max_length, max_new_tokens)
    heats = yield from running(model, arrangement, policy, room.capacity)
    if not heats.heats:
        return (yield from _look(_Reader(model, policy, room, stride), arrangement))
    left = heats.arrangement
    room = Room.of(left, policy.placement, model.max_length, max_new_tokens)
    found = yield from _look(_Reader(model, heats.policy, room, stride), left)
    found.focus.dropped_at.update(heats.dropped_at)
    return replace(found, question_mass={**heats.question_mass, **found.question_mass})


@dataclass(frozen=True, slots=True)
class _Reader:
    """What all readings of a question have in common."""

    model: Model
    policy: Policy
    room: Room
    stride: int


def _look(reader: _Reader, arrangement: Arrangement) -> Work[Look]:
    """The same over documents that have been through their heats, or need none."""
    policy = reader.policy
    arranged, placed = place(arrangement, policy.placement, reader.room.capacity)
    repair = policy.repair if arranged.units else None
    if repair is None or repair.needs_question or policy.pruning is not None:
        found = yield from _read(reader, arranged, placed, policy.pruning, repair)
        if repair is not None:
            found = yield from _mend(reader, arranged, found, repair)
    else:
        found = yield from _read_mended(reader, arranged, repair, {})
    if policy.max_risk is not None and found.risk.value > policy.max_risk and arrangement.units:
        return (yield from _in_full(reader, arrangement, found))
    return found


def _read(
    reader: _Reader,
    arrangement: Arrangement,
    placed: Placed,
    pruning: Pruning | None,
    repair: Repair | None = None,
) -> Work[Look]:
    """Read the fresh tokens once."""
    model, policy = reader.model, reader.policy
    focus = Focus(
        arrangement,
        placed,
        placement=policy.placement,
        pruning=pruning,
        capacity=reader.room.capacity,
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
    found = yield from reading_prompt(
        composed.table,
        composed.tokens,
        composed.positions,
        fresh,
        tables=focus,
        looking=Looking(policy.group, layers, from_row),
        stride=STRIDE if pruning is not None or layers else reader.stride,
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
        _layers(found, composed, focus.tables),
        composed.end - (len(composed.tokens) - composed.question),
        arrangement.num_again,
    )


def _question_mass(found: Read, composed: Composed) -> dict[int, float]:
    rows = found.mass[..., composed.question :]
    return {
        s.document: float(rows[:, i].mean()) for i, s in enumerate(composed.table) if s.document is not None
    }


def _layers(found: Read, composed: Composed, tables: Sequence[SegmentTable]) -> list[dict[int, Seen]]:
    """Places and shares of the documents that each layer read."""
    shares = torch.stack((found.mass, found.focus))[..., composed.question :].mean(-1).tolist()
    return [
        {
            s.document: Seen(s.target, mass[i], focus[i])
            for i, s in enumerate(table)
            if s.document is not None and s.is_read_by(layer)
        }
        for layer, (table, mass, focus) in enumerate(zip(tables, *shares, strict=True))
    ]


def _by_document(composed: Composed, columns: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    pairs = zip(composed.table, columns, strict=True)
    return {segment.document: c for segment, c in pairs if segment.document is not None}


def _mend(reader: _Reader, arrangement: Arrangement, found: Look, repair: Repair) -> Work[Look]:
    """Read the question again over the survivors, at their last places, with some of their rows anew."""
    focus = found.focus
    placed = {number: start for number, start in focus.starts().items() if number in focus.kept}
    kept = arrangement.only(focus.kept).placed(placed, arrangement.query).in_order()
    again = yield from _read_mended(reader, kept, repair, found.columns)
    return replace(again, focus=focus, columns=found.columns, **_first(found))


def _read_mended(reader: _Reader, arrangement: Arrangement, repair: Repair, columns: Columns) -> Work[Look]:
    """Choose rows, and read them and the question."""
    evidence = Evidence(lambda layer: deviations(reader.model, arrangement, layer), columns)
    mended = arrangement.again(repair.rows(arrangement, evidence))
    placed = Placed(tuple(unit.start for unit in arrangement.units), arrangement.query)
    return (yield from _read(reader, mended, placed, None))


def _in_full(reader: _Reader, arrangement: Arrangement, found: Look) -> Work[Look]:
    """Read every document anew, if they all fit as the prompt has them; else what was found stays."""
    if sum(unit.length for unit in arrangement.units) > reader.room.capacity:
        return found
    whole = arrangement.again({u.number: range(u.kv.num_tokens) for u in arrangement.units})
    placed = Placed(tuple(u.start for u in whole.units), whole.query)
    plain = replace(reader, policy=replace(reader.policy, group=None))
    full = yield from _read(plain, whole, placed, None)
    return replace(full, risk=found.risk, in_full=True, **_first(found))


def _first(found: Look) -> dict[str, Any]:
    """What the first reading of the question saw, for one that comes after it."""
    return {
        "question_mass": found.question_mass,
        "layers": found.layers,
        "question_at": found.question_at,
    }


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
        model,
        Fixed(composed.table),
        composed.tokens[:num],
        composed.positions[:num],
        num_layers=layer + 1,
        rows_alone=True,
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
