"""Segment attention equals a dense softmax over keys that are rotated to the places where they appear."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag_kernels import Attended, RowMask, Rows, Turn, segment_attention, segment_attention_reference
from kvrag_kernels.segment_attention import (
    Group,
    cpu,
    gathered,
    segment_attention_cpu,
    segment_attention_gathered,
)

FAR = 1_000_000
APE = Group(temperature=0.5, scale=0.8)

# Difference from float64, by norms; and the largest one, relative to the largest value: half precision rounds
# the turned query, and the reference its scores too.
ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _gathered(
    query: torch.Tensor, segments: list[Rows], turn: Turn | None, *, scale: float, **others: object
) -> Attended:
    """Over rows brought together, in several blocks, where that is possible."""
    sinks, asked = others.pop("sinks", None), [x for x in others.values() if x is not None]
    if asked or not gathered.is_supported(query, segments, turn):
        return segment_attention(query, segments, turn, scale=scale, sinks=sinks, **others)
    small = {"_CELLS": 700, "_MOST_ELEMENTS": 900, "_MOST_RIDING": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(gathered, name, value)
        return segment_attention_gathered(query, segments, turn, scale=scale, sinks=sinks)


PATHS: dict[str, Callable[..., Attended]] = {
    "dispatched": segment_attention,
    "reference": segment_attention_reference,
    "gathered": _gathered,
}


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote to is NaN, so that reading it shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Part:
    """One segment of a case.

    Attributes:
        size: rows.
        target: position of its first row.
        first_row: query rows before this one do not see it.
        hidden: share of rows that a random mask hides; 1 makes blind query rows.
        window: rows further back than this are hidden.
        grouped: belongs to the context group.
    """

    size: int
    target: int
    first_row: int = 0
    hidden: float = 0.0
    window: int | None = None
    grouped: bool = False


@dataclass(frozen=True)
class Case:
    """Shapes and places; the fresh rows stand at `position`, in order, and see themselves causally."""

    parts: tuple[Part, ...] = (Part(9, 0), Part(5, 12))
    rows: int = 4
    position: int = 40
    batch: int = 1
    kv_heads: int = 2
    groups: int = 2
    dim: int = 16
    value_dim: int | None = None
    pairs: int | None = None
    start: int = 0
    interleaved: bool = False
    rotated: bool = True
    shared: bool = False
    sinks: bool = False
    softcap: float | None = None
    group: Group | None = None
    dtype: torch.dtype = torch.float32


def turned(x: torch.Tensor, positions: torch.Tensor, case: Case) -> torch.Tensor:
    """Rotate [..., T, D] by complex multiplication, in float64."""
    if not case.rotated:
        return x.double()
    pairs = case.pairs or case.dim // 2
    phase = torch.polar(torch.ones(len(positions), pairs, dtype=torch.float64), angles(positions, pairs))
    out = x.double().clone()
    inner = out[..., case.start : case.start + 2 * pairs]
    if case.interleaved:
        z = torch.complex(inner[..., 0::2].clone(), inner[..., 1::2].clone()) * phase
        inner[..., 0::2], inner[..., 1::2] = z.real, z.imag
    else:
        z = torch.complex(inner[..., :pairs].clone(), inner[..., pairs:].clone()) * phase
        inner[..., :pairs], inner[..., pairs:] = z.real, z.imag
    return out


def angles(positions: torch.Tensor, pairs: int) -> torch.Tensor:
    frequencies = (10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)).float().double()
    return positions.double()[..., None] * frequencies


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    segments: list[Rows]
    turn: Turn | None
    sinks: torch.Tensor | None
    targets: list[int]
    visible: list[torch.Tensor]
    positions: torch.Tensor


def window_into(x: torch.Tensor) -> torch.Tensor:
    """The same rows as a view of a larger buffer whose other rows nobody wrote."""
    buffer = torch.full((*x.shape[:2], x.shape[2] + 5, x.shape[3]), float("nan"), dtype=x.dtype)
    buffer[:, :, 2 : 2 + x.shape[2]] = x
    return buffer[:, :, 2 : 2 + x.shape[2]]


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    positions = case.position + torch.arange(case.rows)
    owners = 1 if case.shared else case.batch
    segments, targets, visible = [], [], []
    for part in case.parts:
        first = min(part.first_row, case.rows)
        local = torch.arange(part.size)
        keys = turned(normal(owners, case.kv_heads, part.size, case.dim), local, case).to(case.dtype)
        values = normal(owners, case.kv_heads, part.size, case.value_dim or case.dim)
        allowed = torch.rand(case.rows - first, part.size, generator=generator) >= part.hidden
        if part.window is not None:
            allowed &= positions[first:, None] - (part.target + local) < part.window
        mask = None if bool(allowed.all()) and not part.hidden else RowMask(allowed)
        rows = Rows(window_into(keys), window_into(values), part.first_row, mask, in_group=part.grouped)
        segments.append(rows)
        targets.append(part.target)
        seen = torch.zeros(case.rows, part.size, dtype=torch.bool)
        seen[first:] = allowed
        visible.append(seen)
    keys = turned(normal(case.batch, case.kv_heads, case.rows, case.dim), positions, case).to(case.dtype)
    values = normal(case.batch, case.kv_heads, case.rows, case.value_dim or case.dim)
    segments.append(Rows(window_into(keys), window_into(values), causal=case.rows > 1))
    targets.append(0)
    visible.append(torch.ones(case.rows, case.rows, dtype=torch.bool).tril())
    turn = None
    if case.rotated:
        by = angles(positions[None] - torch.tensor(targets)[:, None], case.pairs or case.dim // 2)
        turn = Turn(by.cos().float(), by.sin().float(), case.start, case.interleaved)
    heads = case.kv_heads * case.groups
    sinks = torch.randn(heads, generator=generator) if case.sinks else None
    query = normal(case.batch, heads, case.rows, case.dim)
    return Inputs(query, segments, turn, sinks, targets, visible, positions)


def dense(inputs: Inputs, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, masses and the sinks' share, from one softmax in float64 over all keys at their places."""
    query = turned(inputs.query, inputs.positions, case)
    keys, values = [], []
    for rows, target in zip(inputs.segments, inputs.targets, strict=True):
        there = turned(rows.keys, torch.full((rows.keys.shape[2],), target), case)
        keys.append(there.expand(case.batch, -1, -1, -1).repeat_interleave(case.groups, 1))
        values.append(rows.values.double().expand(case.batch, -1, -1, -1).repeat_interleave(case.groups, 1))
    scores = torch.einsum("bhtd,bhnd->bhtn", query, torch.cat(keys, 2)) * case.dim**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~torch.cat(inputs.visible, 1), float("-inf"))
    extra = torch.full((*scores.shape[:3], 1), float("-inf"), dtype=torch.float64)
    if inputs.sinks is not None:
        extra[:] = inputs.sinks.double()[None, :, None, None]
    scores = torch.cat((scores, extra), -1)
    probs = scores.softmax(-1) if case.group is None else grouped(scores, inputs.segments, case.group)
    parts = probs[..., :-1].split([v.shape[1] for v in inputs.visible], -1)
    out = torch.einsum("bhtn,bhnd->bhtd", probs[..., :-1], torch.cat(values, 2))
    return out, torch.stack([p.sum(-1) for p in parts]), probs[..., -1]


def grouped(scores: torch.Tensor, segments: list[Rows], group: Group) -> torch.Tensor:
    """Probabilities in two steps: the group against the rest (the sink is the last column), then inside."""
    inside = torch.tensor([r.in_group for r in segments for _ in range(r.keys.shape[2])] + [False])
    within, rest = scores[..., inside] / group.temperature, scores[..., ~inside]
    weight = group.scale * group.temperature * within.logsumexp(-1)
    weight = torch.stack((weight, rest.logsumexp(-1)), -1).softmax(-1)[..., None]
    probs = torch.empty_like(scores)
    probs[..., inside] = within.softmax(-1).nan_to_num(0.0) * weight[..., 0, :]
    probs[..., ~inside] = rest.softmax(-1) * weight[..., 1, :]
    return probs


def check(case: Case, path: Callable[..., Attended] = segment_attention, seed: int = 0) -> None:
    inputs = inputs_of(case, seed)
    got = path(
        inputs.query,
        inputs.segments,
        inputs.turn,
        scale=case.dim**-0.5,
        softcap=case.softcap,
        sinks=inputs.sinks,
        group=case.group,
    )
    out, mass, sink = dense(inputs, case)
    tolerance = TOLERANCE[case.dtype]
    assert got.out.dtype == case.dtype
    assert got.mass.dtype == torch.float32
    assert got.out.shape == out.shape
    assert got.mass.shape == mass.shape
    assert float((got.out.double() - out).norm() / out.norm().clamp_min(1e-9)) < ERROR[case.dtype]
    assert float((got.out.double() - out).abs().max()) <= tolerance * max(1.0, float(out.abs().max()))
    assert float((got.mass.double() - mass).abs().max()) <= tolerance
    assert torch.allclose(
        got.mass.double().sum(0) + sink, torch.ones_like(sink), atol=max(tolerance / 4, 1e-5)
    )
    hidden = torch.stack([~v.any(1) for v in inputs.visible])[:, None, None].expand_as(got.mass)
    assert not got.mass[hidden].any(), "a segment that a row does not see got mass from it"


CASES = {
    "one": Case(),
    "decode": Case(rows=1),
    "no segments": Case(parts=()),
    "empty": Case(parts=(Part(0, 3), Part(7, 3), Part(0, 50))),
    "only empty": Case(parts=(Part(0, 0),)),
    "overlapping": Case(parts=(Part(9, 4), Part(9, 6), Part(9, 6))),
    "shared place": Case(parts=tuple(Part(6, 5) for _ in range(7))),
    "far": Case(parts=(Part(9, 0), Part(9, FAR - 40), Part(9, 7)), position=FAR),
    "behind the query": Case(parts=(Part(9, 90), Part(9, 35)), position=40),
    "negative": Case(parts=(Part(9, -30), Part(9, 0))),
    "first rows": Case(parts=(Part(5, 0), Part(5, 6, 1), Part(5, 12, 3), Part(5, 20, 99)), rows=4),
    "windows": Case(parts=(Part(9, 0, window=30), Part(9, 20, window=18), Part(9, 30, 2, window=30)), rows=6),
    "blind rows": Case(
        parts=(Part(9, 0, hidden=1.0), Part(9, 20, hidden=0.6), Part(3, 30, 1, hidden=1.0)), rows=5
    ),
    "all blind": Case(parts=(Part(9, 0, hidden=1.0),), rows=1),
    "batch": Case(batch=3),
    "batch, shared keys": Case(batch=3, shared=True),
    "groups 1": Case(groups=1),
    "groups 4": Case(groups=4, kv_heads=1),
    "groups 7": Case(groups=7, kv_heads=3, dim=20),
    "sinks": Case(sinks=True),
    "sinks, decode": Case(sinks=True, rows=1, groups=7),
    "softcap": Case(softcap=2.0),
    "values wider": Case(value_dim=24),
    "values narrower": Case(value_dim=10, groups=1),
    "interleaved": Case(interleaved=True),
    "partial": Case(pairs=3),
    "partial, interleaved": Case(pairs=3, interleaved=True),
    "last dimensions": Case(pairs=4, start=8),
    "middle": Case(pairs=2, start=5, interleaved=True),
    "no positions": Case(rotated=False),
    "long": Case(parts=(Part(700, 0), Part(333, 700, 2)), rows=67, position=1033, dim=64),
    "group": Case(parts=(Part(5, 0), Part(9, 5, grouped=True), Part(7, 5, grouped=True)), group=APE),
    "group, hotter": Case(parts=(Part(9, 5, grouped=True), Part(6, 0)), group=Group(1.7, 1.3)),
    "group, as one": Case(parts=(Part(9, 5, grouped=True), Part(6, 0)), group=Group(0.5, 2.0)),
    "group of none": Case(group=APE),
    "group, empty": Case(parts=(Part(0, 5, grouped=True), Part(6, 0)), group=APE),
    "group, sinks": Case(
        parts=(Part(9, 5, grouped=True), Part(6, 0), Part(8, 5, 2, grouped=True)), sinks=True, group=APE
    ),
    "group, blind rows": Case(
        parts=(Part(9, 0, 2, grouped=True), Part(9, 20, grouped=True, hidden=1.0), Part(3, 30)),
        rows=5,
        group=APE,
    ),
    "everything": Case(
        parts=(
            Part(11, 0),
            Part(0, 11, grouped=True),
            Part(17, FAR, 2, hidden=0.5, grouped=True),
            Part(8, 3, 1, window=40, grouped=True),
        ),
        group=Group(0.8, 0.9),
        rows=5,
        batch=2,
        shared=True,
        groups=7,
        kv_heads=2,
        dim=24,
        value_dim=18,
        pairs=5,
        start=14,
        sinks=True,
        softcap=3.0,
    ),
}


def test_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_equals_a_dense_softmax(name: str, path: str, dtype: torch.dtype, fresh_numbers: int) -> None:
    check(replace(CASES[name], dtype=dtype), PATHS[path], fresh_numbers)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
def test_heads_of_models_and_any_group_of_them(dim: int, dtype: torch.dtype, fresh_numbers: int) -> None:
    """Odd lengths, and query heads to a key head as they come."""
    draw = random.Random(fresh_numbers)
    sizes = [2 * draw.randrange(40) + 1 for _ in range(3)]
    case = Case(
        parts=tuple(Part(size, draw.randrange(500)) for size in sizes),
        rows=draw.randrange(1, 12),
        position=600,
        kv_heads=draw.randrange(1, 4),
        groups=draw.randrange(1, 9),
        dim=dim,
        dtype=dtype,
    )
    print(case)
    for path in PATHS.values():
        check(case, path, fresh_numbers)


parts = st.builds(
    Part,
    size=st.integers(0, 40),
    target=st.one_of(st.integers(-50, 200), st.integers(FAR - 200, FAR)),
    first_row=st.integers(0, 8),
    hidden=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    window=st.one_of(st.none(), st.integers(1, 100)),
    grouped=st.booleans(),
)
cases = st.builds(
    Case,
    parts=st.lists(parts, max_size=5).map(tuple),
    rows=st.integers(1, 9),
    position=st.sampled_from([0, 60, 150, FAR + 3]),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 7]),
    dim=st.sampled_from([12, 16, 20, 64]),
    value_dim=st.sampled_from([None, None, 8, 22]),
    pairs=st.sampled_from([None, 2, 4]),
    interleaved=st.booleans(),
    rotated=st.sampled_from([True, True, False]),
    shared=st.booleans(),
    sinks=st.booleans(),
    softcap=st.sampled_from([None, None, 4.0]),
    group=st.sampled_from([None, None, APE, Group(1.5, 0.7), Group(0.7, 1.2)]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)


@given(case=cases, seed=st.integers(0, 1000))
@settings(max_examples=150)
def test_any_case_equals_a_dense_softmax(case: Case, seed: int) -> None:
    for path in PATHS.values():
        check(case, path, seed)


def test_the_cpu_path_is_the_one_that_is_dispatched() -> None:
    """Without a soft cap and with one head size; so the cases above have tested it."""
    inputs = inputs_of(Case())
    arguments = {"scale": 0.25, "sinks": None}
    got = segment_attention(inputs.query, inputs.segments, inputs.turn, **arguments)
    expected = segment_attention_cpu(inputs.query, inputs.segments, inputs.turn, **arguments)
    assert torch.equal(got.out, expected.out)
    assert torch.equal(got.mass, expected.mass)


GATHERED = {
    "many rows over short ones": Case(parts=(Part(90, 0), Part(200, 90, 3)), rows=90, position=400),
    "sinks": Case(parts=(Part(90, 0), Part(200, 90, 3)), rows=90, position=400, sinks=True),
    "one and one": Case(
        parts=(Part(90, 0, grouped=True), Part(99, 90)), rows=90, position=400, group=Group(1, 1)
    ),
}
SHORT = (Part(90, 0), Part(200, 90))
APART = {
    "long ones": Case(parts=(Part(400, 0), Part(400, 90)), rows=90, position=900),
    "few rows": Case(parts=SHORT, rows=40, position=400),
    "masks": Case(parts=(Part(90, 0, hidden=0.3), Part(200, 90)), rows=90, position=400),
    "a soft cap": Case(parts=SHORT, rows=90, position=400, softcap=2.0),
    "a group": Case(parts=(Part(90, 0, grouped=True), Part(20, 90)), rows=90, position=400, group=APE),
    "half precision": Case(parts=SHORT, rows=90, position=400, dtype=torch.bfloat16),
    "late ones": Case(parts=(Part(90, 0), Part(200, 90, 30)), rows=90, position=400),
    "a batch": Case(parts=SHORT, rows=90, position=400, batch=2),
}


@pytest.mark.parametrize("name", [*GATHERED, *APART])
def test_many_rows_over_short_segments_are_gathered(
    name: str, fresh_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    real = gathered.Gathered.attend
    monkeypatch.setattr(gathered.Gathered, "attend", lambda *a: (taken.append(1), real(*a))[1])
    check((GATHERED | APART)[name], segment_attention, fresh_numbers)
    assert bool(taken) is (name in GATHERED)


def test_inputs_are_not_written_to() -> None:
    inputs = inputs_of(CASES["everything"])
    before = [
        t.clone() for t in (inputs.query, *(x for rows in inputs.segments for x in (rows.keys, rows.values)))
    ]
    for path in PATHS.values():
        path(inputs.query, inputs.segments, inputs.turn, scale=0.25, sinks=inputs.sinks)
    after = (inputs.query, *(x for rows in inputs.segments for x in (rows.keys, rows.values)))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_segment_in_pieces_is_the_same_segment() -> None:
    """Split anywhere, the pieces' masses add up and the output stays."""
    case = Case(parts=(Part(24, 10),), rows=3)
    inputs = inputs_of(case)
    whole = segment_attention(inputs.query, inputs.segments, inputs.turn, scale=0.25)
    (rows, fresh), turn = inputs.segments, inputs.turn
    assert turn is not None
    split = [Rows(rows.keys[:, :, a:b], rows.values[:, :, a:b]) for a, b in ((0, 1), (1, 20), (20, 24))]
    index = torch.tensor([0, 0, 0, 1])
    pieces = segment_attention(
        inputs.query, [*split, fresh], Turn(turn.cos[index], turn.sin[index]), scale=0.25
    )
    assert torch.allclose(pieces.out, whole.out, atol=1e-6)
    assert torch.allclose(pieces.mass[:3].sum(0), whole.mass[0], atol=1e-6)


def test_needs_a_segment() -> None:
    with pytest.raises(ValueError, match="at least one segment"):
        segment_attention(torch.zeros(1, 2, 1, 8), [], None, scale=1.0)


def test_needs_heads_that_divide() -> None:
    rows = Rows(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        segment_attention(torch.zeros(1, 3, 1, 8), [rows], None, scale=1.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_turning_the_query_segment_by_segment_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    late = (Part(9, 0), Part(7, 9, first_row=3), Part(6, 16, first_row=5, hidden=0.4), Part(3, 22, 40))
    inputs = inputs_of(Case(late, rows=8, dtype=dtype))
    at_once, one_by_one = (
        _turned_by(monkeypatch, inputs, border)
        for border in (inputs.query.numel() * len(inputs.segments), inputs.query.numel())
    )
    assert torch.equal(at_once.out, one_by_one.out)
    assert torch.equal(at_once.mass, one_by_one.mass)


def _turned_by(monkeypatch: pytest.MonkeyPatch, inputs: Inputs, border: int) -> Attended:
    """Attention that turns as many elements at once."""
    monkeypatch.setattr(cpu, "_AT_ONCE", border)
    return segment_attention_cpu(inputs.query, inputs.segments, inputs.turn, scale=0.25)
