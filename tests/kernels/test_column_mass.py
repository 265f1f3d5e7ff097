"""The mass of a segment's columns is what a dense softmax over everything gives them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from kvrag_kernels import RowMask, Rows, Turn, segment_attention, segment_attention_reference
from kvrag_kernels.segment_attention import Group, column_mass, columns, part_mass
from kvrag_kernels.segment_attention.reference import turn_query, visible

SCALE, DIM = 0.4, 8


@dataclass(frozen=True)
class Case:
    """Shapes; the segments are whole, masked, late, and the query rows' own."""

    rows: int = 5
    kv_heads: int = 2
    heads: int = 6
    softcap: float | None = None
    sinks: bool = False
    rotated: bool = True
    group: Group | None = None


CASES = {
    "grouped heads": Case(),
    "one head each": Case(heads=2),
    "decode": Case(rows=1),
    "softcap": Case(softcap=1.5),
    "sinks": Case(sinks=True),
    "no positions": Case(rotated=False),
    "group": Case(group=Group(0.5, 0.8)),
    "everything": Case(softcap=2.0, sinks=True, heads=8, rows=7, group=Group(1.4, 0.9)),
}


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    segments: list[Rows]
    turn: Turn | None
    sinks: torch.Tensor | None

    def turn_of(self, i: int) -> Turn | None:
        if self.turn is None:
            return None
        return replace(self.turn, cos=self.turn.cos[i : i + 1], sin=self.turn.sin[i : i + 1])


def _inputs(case: Case) -> Inputs:
    normal = torch.randn

    def rows(n: int, **options: object) -> Rows:
        return replace(Rows(normal(1, case.kv_heads, n, DIM), normal(1, case.kv_heads, n, DIM)), **options)

    allowed = torch.rand(case.rows, 9) < 0.6
    allowed[0] = case.rows == 1  # a query row that sees nothing of the segment
    first = min(2, case.rows - 1)
    late = torch.rand(case.rows - first, 6) < 0.5
    segments = [
        rows(7),
        rows(9, mask=RowMask(allowed), in_group=True),
        rows(0, in_group=True),
        rows(6, first_row=first, mask=RowMask(late), in_group=True),
        rows(4, first_row=case.rows - 1),
        rows(3, first_row=case.rows),
        rows(case.rows, causal=True),
    ]
    angles = 6 * torch.rand(len(segments), case.rows, DIM // 2)
    turn = Turn(angles.cos(), angles.sin()) if case.rotated else None
    sinks = normal(case.heads) if case.sinks else None
    return Inputs(normal(1, case.heads, case.rows, DIM), segments, turn, sinks)


def _dense(inputs: Inputs, case: Case) -> list[torch.Tensor]:
    """[H, T, n] of each segment: its columns of the whole matrix of probabilities, in float64."""
    scores = []
    for i, rows in enumerate(inputs.segments):
        turned = turn_query(inputs.query, inputs.turn_of(i), 1)[0, 0].double()
        s = SCALE * turned @ rows.keys[0].double().repeat_interleave(case.heads // case.kv_heads, 0).mT
        if case.softcap is not None:
            s = case.softcap * torch.tanh(s / case.softcap)
        scores.append(s.masked_fill(~visible(rows, case.rows), float("-inf")))
    if case.group is not None:
        inside = torch.cat([s for s, r in zip(scores, inputs.segments, strict=True) if r.in_group], -1)
        total = (inside / case.group.temperature).exp().sum(-1, keepdim=True)
        factor = total ** (case.group.scale * case.group.temperature - 1)
        for i, rows in enumerate(inputs.segments):
            if rows.in_group:
                scores[i] = scores[i] / case.group.temperature + factor.log().nan_to_num(posinf=0, neginf=0)
    extra = torch.full((case.heads, case.rows, 1), float("-inf"), dtype=torch.float64)
    if inputs.sinks is not None:
        extra[:] = inputs.sinks.double()[:, None, None]
    probs = torch.cat([*scores, extra], -1).softmax(-1)
    return list(probs.split([*(s.shape[-1] for s in scores), 1], -1)[:-1])


@pytest.mark.parametrize("cells", [columns._CELLS, 100, 1], ids=["whole", "chunks", "row by row"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_columns(name: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_CELLS", cells)
    case = CASES[name]
    inputs = _inputs(case)
    for attend in (segment_attention, segment_attention_reference):
        attended = attend(
            inputs.query,
            inputs.segments,
            inputs.turn,
            scale=SCALE,
            softcap=case.softcap,
            sinks=inputs.sinks,
            group=case.group,
        )
        for i, expected in enumerate(_dense(inputs, case)):
            rows = inputs.segments[i]
            for from_row in {0, case.rows // 2, case.rows - 1}:
                got = column_mass(
                    inputs.query,
                    rows,
                    inputs.turn_of(i),
                    attended.mass[i],
                    scale=SCALE,
                    softcap=case.softcap,
                    temperature=case.group.temperature if case.group and rows.in_group else 1.0,
                    from_row=from_row,
                )
                assert got.dtype is torch.float32
                assert got.shape == rows.keys.shape[2:3]
                wanted = expected[:, from_row:].mean((0, 1)).float()
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
                share = attended.mass[i][..., from_row:].mean()
                torch.testing.assert_close(got.sum(), share, rtol=1e-5, atol=1e-6)


def test_rows_that_see_nothing_count_as_zero() -> None:
    inputs = _inputs(Case())
    blind = replace(inputs.segments[1], mask=RowMask(torch.zeros(5, 9, dtype=torch.bool)))
    got = column_mass(inputs.query, blind, inputs.turn_of(1), torch.zeros(1, 6, 5), scale=SCALE)
    assert torch.equal(got, torch.zeros(9))


def test_half_precision_gives_float32() -> None:
    inputs = _inputs(Case())
    rows = inputs.segments[0]
    half = Rows(rows.keys.bfloat16(), rows.values.bfloat16())
    mass = torch.full((1, 6, 5), 0.25)
    got = column_mass(inputs.query.bfloat16(), half, inputs.turn_of(0), mass, scale=SCALE)
    exact = column_mass(inputs.query, rows, inputs.turn_of(0), mass, scale=SCALE)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, exact, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(got.sum(), torch.tensor(0.25), rtol=1e-5, atol=1e-6)


def test_inputs_are_not_written_to() -> None:
    inputs = _inputs(Case(rotated=False))
    rows, mass = inputs.segments[0], torch.full((1, 6, 5), 0.25)
    before = [t.clone() for t in (inputs.query, rows.keys, mass)]
    column_mass(inputs.query, rows, None, mass, scale=SCALE, softcap=2.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (inputs.query, rows.keys, mass), strict=True))


def test_takes_one_sequence_and_a_row_to_start_from() -> None:
    inputs, mass = _inputs(Case()), torch.zeros(1, 6, 5)
    rows = inputs.segments[0]
    with pytest.raises(ValueError, match="not a batch of 2"):
        column_mass(inputs.query.expand(2, -1, -1, -1), rows, None, mass, scale=SCALE)
    for from_row in (5, -1):
        with pytest.raises(ValueError, match=r"from_row must lie in 0\.\.4"):
            column_mass(inputs.query, rows, None, mass, scale=SCALE, from_row=from_row)


@pytest.mark.parametrize("cells", [columns._CELLS, 1], ids=["whole", "row by row"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.group is None])
def test_runs_of_columns_get_what_their_columns_get(
    name: str, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_CELLS", cells)
    case = CASES[name]
    inputs = _inputs(case)
    attended = segment_attention(
        inputs.query, inputs.segments, inputs.turn, scale=SCALE, softcap=case.softcap, sinks=inputs.sinks
    )
    from_row = case.rows // 2
    for i, expected in enumerate(_dense(inputs, case)):
        n = inputs.segments[i].keys.shape[2]
        parts = [(0, n // 2), (n // 2, n), (n, n + 5)]
        got = part_mass(
            inputs.query,
            inputs.segments[i],
            inputs.turn_of(i),
            attended.mass[i],
            parts,
            scale=SCALE,
            softcap=case.softcap,
            from_row=from_row,
        )
        assert got.shape == (3, 1, case.heads, case.rows)
        assert not got[..., :from_row].any()
        for (first, end), found in zip(parts, got, strict=True):
            wanted = expected[:, from_row:, first:end].sum(-1).float()
            torch.testing.assert_close(found[0, :, from_row:], wanted, rtol=1e-4, atol=1e-6)
