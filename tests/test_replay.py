"""A decode step over static buffers gives what the ordinary step gives, token after token.

Runs in Triton's interpreter without a graph; the test marked `gpu` captures one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from kvrag.attention import Looking
from kvrag.decode import Behind
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import Read, Want, encode
from kvrag.replay import DecodeStep, ReplayedWant, can_replay
from kvrag.segments import KV, LayerKV, Segment, SegmentTable
from kvrag.testing.models import tiny
from kvrag_kernels import Group, using

pytest.importorskip("triton", reason="the extra kvrag[triton] is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

CPU, GPU = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)
TEXTS = ([5, 9, 40, 41, 42], [60, 61, 62], [70, 71, 72, 73, 74, 75, 76])
ANSWER = (11, 12, 13)


@cache
def model(family: str, device: str = "cpu") -> Model:
    found = tiny(family)
    found.network.to(device)
    return found


def table_of(found: Model) -> SegmentTable:
    """A prefix, and documents that are turned and one of which only the first layer reads."""
    prefix, *documents = encode(found, TEXTS)
    first, second = documents
    device = found.device
    return SegmentTable(
        (
            Segment(prefix.to(device), 0),
            Segment(first.to(device), 9, document=0, hidden=(1,)),
            Segment(second.to(device), 5, document=1, until_layer=1),
        )
    )


def prompt_read(found: Model, table: SegmentTable) -> FreshRows:
    fresh = FreshRows(found.num_layers, reserve=1)  # so that the ordinary way has to move its buffers
    Want(table, [1, 2, 3], [20, 21, 22], fresh).read(found)
    return fresh


def same(found: Read, expected: Read) -> None:
    assert found.logits.shape == expected.logits.shape
    for mine, theirs in zip(
        (found.logits, found.mass, found.focus), (expected.logits, expected.mass, expected.focus), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # all of a head rotated, and a part of it
@torch.inference_mode()
def test_every_token_is_read_as_the_ordinary_way_reads_it(family: str, device: str) -> None:
    found = model(family, device)
    table = table_of(found)
    ordinary, replayed = prompt_read(found, table), prompt_read(found, table)
    step = DecodeStep(found, table, replayed)
    for i, token in enumerate(ANSWER):
        expected = Want(table, [token], [23 + i], ordinary).read(found)
        assert step.is_usable
        same(step.read(token, 23 + i), expected)
    assert step.is_captured == (device == "cuda")
    assert replayed.positions == ordinary.positions
    assert replayed.num_rows == ordinary.num_rows


@torch.inference_mode()
def test_both_ways_may_take_turns() -> None:
    """As when others' tokens are read in the same pass; moved buffers end the step."""
    found = model("llama")
    table = table_of(found)
    ordinary, mixed = prompt_read(found, table), prompt_read(found, table)
    step = DecodeStep(found, table, mixed)
    for i, token in enumerate(ANSWER):
        expected = Want(table, [token], [23 + i], ordinary).read(found)
        want = Want(table, [token], [23 + i], mixed)
        same(want.read(found) if i % 2 else step.read(token, 23 + i), expected)
    mixed.hold(5000)
    assert not step.is_usable


def test_an_answer_is_replayed_after_its_first_tokens() -> None:
    found = model("llama")
    table = table_of(found)
    looking = Looking(Group(0.7, 0.9))
    with using("triton"):
        ordinary, replayed = prompt_read(found, table), prompt_read(found, table)
        behind = Behind(table, replayed, found.specs, looking=looking)
        for i, token in enumerate(ANSWER):
            want = behind.want(token, 23 + i)
            assert isinstance(want, ReplayedWant)
            same(want.read(found), Want(table, [token], [23 + i], ordinary, looking).read(found))


def test_rows_that_the_kernel_cannot_read_are_read_the_ordinary_way() -> None:
    found = model("llama")
    table = table_of(found)
    layers = table.segments[0].kv.layers
    apart = tuple(LayerKV(x.keys.mT.contiguous().mT, x.values) for x in layers)
    table = SegmentTable((Segment(KV(table.segments[0].kv.tokens, apart), 0), *table.segments[1:]))
    with using("triton"):
        ordinary, replayed = prompt_read(found, table), prompt_read(found, table)
        behind = Behind(table, replayed, found.specs)
        for i, token in enumerate(ANSWER):
            expected = Want(table, [token], [23 + i], ordinary).read(found)
            same(behind.want(token, 23 + i).read(found), expected)
    assert replayed.positions == ordinary.positions


def test_what_changes_with_the_position_is_not_replayed() -> None:
    found = model("llama")
    table, fresh, specs, device = table_of(found), FreshRows(found.num_layers), found.specs, found.device
    with using("triton"):
        assert can_replay(table, fresh, specs, None, device)
        assert not can_replay(table, fresh, [replace(specs[0], window=9), *specs[1:]], None, device)
        assert not can_replay(table, fresh, specs, Looking(column_layers=frozenset({0})), device)
        late = SegmentTable((replace(table.segments[0], first_row=1),))
        assert not can_replay(late, fresh, specs, None, device)
    assert not can_replay(table, fresh, specs, None, device)


def test_needs_rows_of_a_prompt() -> None:
    with pytest.raises(ValueError, match="nothing was read yet"):
        DecodeStep(model("llama"), SegmentTable(), FreshRows(model("llama").num_layers))
