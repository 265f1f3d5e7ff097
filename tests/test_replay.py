"""A decode step over static buffers gives what the ordinary step gives, token after token.

Runs in Triton's interpreter without a graph; the test marked `gpu` captures one.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache

import pytest
import torch

from kvrag.attention import Looking
from kvrag.decode import Behind
from kvrag.encoding import encode
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.passes import Passes
from kvrag.prefill import Read, Want
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
        largest = float(theirs.abs().max()) if theirs.numel() else 0.0
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # all of a head rotated, and a part of it
@torch.inference_mode()
def test_every_token_is_read_as_the_ordinary_way_reads_it(family: str, device: str) -> None:
    found = model(family, device)
    table = table_of(found)
    ordinary, replayed = prompt_read(found, table), prompt_read(found, table)
    step = DecodeStep(found, [table], [replayed])
    for i, token in enumerate(ANSWER):
        expected = Want(table, [token], [23 + i], ordinary).read(found)
        assert step.is_usable
        same(step.read([token], [23 + i])[0], expected)
    assert step.is_captured == (device == "cuda")
    assert replayed.positions == ordinary.positions
    assert replayed.num_rows == ordinary.num_rows


@pytest.mark.gpu
@pytest.mark.parametrize("num", [1, 3])
@torch.inference_mode()
def test_a_hundred_replays_are_equal_bit_for_bit(num: int) -> None:
    found = model("llama", "cuda")
    made = requests_of(found)[:num]
    tables, several, ends = zip(*made, strict=True)
    step, first = DecodeStep(found, tables, several), None
    for _ in range(101):
        reads = step.read([11] * num, [end + 1 for end in ends])
        if step.is_captured:  # the first run captures
            bits = [x for read in reads for x in (read.logits, read.mass, read.focus)]
            first = first or bits
            assert all(torch.equal(a, b) for a, b in zip(first, bits, strict=True))
        for fresh in several:
            fresh.cut(fresh.num_rows - 1)


@torch.inference_mode()
def test_both_ways_may_take_turns() -> None:
    """As when others' tokens are read in the same pass; moved buffers end the step."""
    found = model("llama")
    table = table_of(found)
    ordinary, mixed = prompt_read(found, table), prompt_read(found, table)
    step = DecodeStep(found, [table], [mixed])
    for i, token in enumerate(ANSWER):
        expected = Want(table, [token], [23 + i], ordinary).read(found)
        want = Want(table, [token], [23 + i], mixed)
        same(want.read(found) if i % 2 else step.read([token], [23 + i])[0], expected)
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


def requests_of(found: Model, group: Group | None = None) -> list[tuple[SegmentTable, FreshRows, int]]:
    """Three requests: the table as above, a part of it elsewhere, no segments; and their last positions."""
    whole = table_of(found)
    some = SegmentTable((replace(whole.segments[2], target=3, until_layer=None),))
    made = []
    for table, end in ((whole, 22), (some, 40), (SegmentTable(), 4)):
        fresh = FreshRows(found.num_layers, reserve=1)
        tokens = list(range(1, 2 + len(table)))
        looking = Looking(group) if group else None
        Want(table, tokens, range(end - len(tokens) + 1, end + 1), fresh, looking).read(found)
        made.append((table, fresh, end))
    return made


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(
    ("family", "group"), [("llama", Group(0.7, 0.9)), ("gpt_neox", None)], ids=["group", "plain"]
)
@torch.inference_mode()
def test_several_requests_are_read_as_each_alone(family: str, group: Group | None, device: str) -> None:
    found = model(family, device)
    ordinary, replayed = requests_of(found, group), requests_of(found, group)
    looking = Looking(group) if group else None
    tables, several, ends = zip(*replayed, strict=True)
    step = DecodeStep(found, tables, several, group)
    for i, token in enumerate(ANSWER):
        assert step.is_usable
        reads = step.read([token + n for n in range(3)], [end + 1 + i for end in ends])
        for n, (read, (table, fresh, end)) in enumerate(zip(reads, ordinary, strict=True)):
            same(read, Want(table, [token + n], [end + 1 + i], fresh, looking).read(found))
            assert several[n].positions == fresh.positions
    assert step.is_captured == (device == "cuda")
    for mine, (_, theirs, _) in zip(several, ordinary, strict=True):
        for layer in range(found.num_layers):
            for a, b in zip(mine.rows(layer), theirs.rows(layer), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_answers_that_are_written_together_join_and_leave() -> None:
    """A recorded step serves as long as the same ones write, in whatever order they ask."""
    found = model("llama")
    ordinary, replayed = requests_of(found), requests_of(found)
    with using("triton"):
        passes = Passes(found, 99)
        behind = [Behind(table, fresh, found.specs) for table, fresh, _ in replayed]
        ends = [end for _, _, end in replayed]
        used = []
        rounds = [(0, 1), (0, 1), (0, 1), (1, 0), (0, 1, 2), (2, 1, 0), (2, 1, 0), (2, 0)]
        for token, present in enumerate(rounds, start=30):
            wants = []
            for n in present:
                ends[n] += 1
                wants.append(behind[n].want(token + n, ends[n]))
            outcomes = passes.run(wants)
            used.append(passes._replays._replays._step is not None)
            for n, outcome in zip(present, outcomes, strict=True):
                table, fresh, _ = ordinary[n]
                assert isinstance(outcome, Read)
                with using("cpu"):
                    same(outcome, Want(table, [token + n], [ends[n]], fresh).read(found))
        assert used == [False, False, True, True, False, False, True, False]
        del wants, outcomes
        behind.clear()
        gc.collect()
    assert passes._replays._replays._step is None  # nothing is held of answers that are no more
    for (_, mine, _), (_, theirs, _) in zip(replayed, ordinary, strict=True):
        assert mine.positions == theirs.positions


def test_one_that_cannot_be_replayed_is_read_with_the_others_the_ordinary_way() -> None:
    found = model("llama")
    ordinary, mixed = requests_of(found), requests_of(found)
    with using("triton"):
        passes = Passes(found, 99)
        behind = [Behind(table, fresh, found.specs) for table, fresh, _ in mixed[:2]]
        table, fresh, end = mixed[2]
        for i in range(3):
            wants: list[Want] = [b.want(9, mixed[n][2] + 1 + i) for n, b in enumerate(behind)]
            wants.append(Want(table, [9, 8], [end + 1 + 2 * i, end + 2 + 2 * i], fresh))
            for n, outcome in enumerate(passes.run(wants)):
                table_n, fresh_n, _ = ordinary[n]
                assert isinstance(outcome, Read)
                with using("cpu"):
                    same(outcome, Want(table_n, wants[n].tokens, wants[n].positions, fresh_n).read(found))
    assert passes._replays._replays._step is None


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
        DecodeStep(model("llama"), [SegmentTable()], [FreshRows(model("llama").num_layers)])
