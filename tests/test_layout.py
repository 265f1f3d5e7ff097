"""Where rows appear: turns of the query to segments that somebody reads, and only to them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.layout import Layout
from kvrag.rotary import LayerSpec, Rotation
from kvrag.segments import KV, LayerKV, Segment

ROTATION = Rotation(frequencies=(1.0, 0.1, 0.01))


def rows(count: int) -> KV:
    made = torch.zeros(1, count, 6)
    return KV(tuple(range(count)), (LayerKV(made, made),))


@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.integers(0, 6)), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_turns_are_made_for_segments_that_are_read(drawn: list[tuple[int, bool, int]], num_rows: int) -> None:
    """Of each segment: rows, whether fresh ones stand for all of them, the first query row that reads it."""
    segments, at = [], 0
    for count, is_hidden, first in drawn:
        hidden = tuple(range(count)) if is_hidden else ()
        segments.append(Segment(rows(count), at, document=len(segments), hidden=hidden, first_row=first))
        at += count
    positions = torch.arange(at, at + num_rows)
    turn = Layout(LayerSpec(ROTATION), segments, positions, ()).turn
    assert turn is not None
    shifts = torch.tensor([*(segment.shift for segment in segments), 0])
    whole = ROTATION.turn(positions[None] - shifts[:, None])
    for i, (_, is_hidden, first) in enumerate(drawn):
        if is_hidden or first >= num_rows:
            assert not turn.cos[i].any()
            assert not turn.sin[i].any()
        else:
            assert torch.equal(turn.cos[i], whole.cos[i])
            assert torch.equal(turn.sin[i], whole.sin[i])
    assert torch.equal(turn.cos[-1], whole.cos[-1])
    assert torch.equal(turn.sin[-1], whole.sin[-1])
