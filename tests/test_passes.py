"""Several requests in one forward pass: each gets what it would get alone, whatever the others do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.attention import Looking
from kvrag.caches import Caches
from kvrag.encoding import encode
from kvrag.errors import CacheMiss
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.passes import Passes
from kvrag.prefill import Read, Want
from kvrag.segments import KV, Segment, SegmentTable
from kvrag.testing.models import tiny
from kvrag.testing.reads import assert_same_read
from kvrag_kernels import Attended, Group, using
from kvrag_kernels.segment_attention import launch

WORDS = "the lighthouse of varn and a ferry on the mirrow in winter ".split()


@cache
def model(family: str = "llama") -> Model:
    return tiny(family)


@cache
def rows(number: int, family: str = "llama") -> KV:
    """One of many documents."""
    text = " ".join(WORDS[(number * i + number) % len(WORDS)] for i in range(3 + number % 5))
    (kv,) = encode(model(family), [model(family).text.tokenize(text)])
    return kv


@dataclass(frozen=True)
class Request:
    """Documents, tokens read before, tokens to be read, and how."""

    documents: tuple[int, ...]
    before: int
    tokens: tuple[int, ...]
    group: bool = False

    def want(self, family: str = "llama") -> Want:
        """With rows of its own, some of them read already."""
        segments, at = [], 0
        for number, document in enumerate(self.documents):
            kv = rows(document, family)
            segments.append(Segment(kv, at, document=number))
            at += kv.num_tokens
        table, fresh = SegmentTable(tuple(segments)), FreshRows(model(family).num_layers)
        looking = Looking(Group(0.8, 0.9), frozenset([1])) if self.group else None
        if self.before:
            first = range(20, 20 + self.before)
            Want(table, first, range(at, at + self.before), fresh, looking).read(model(family))
        start = at + self.before
        return Want(table, self.tokens, range(start, start + len(self.tokens)), fresh, looking)


def assert_same_rows(found: FreshRows, expected: FreshRows) -> None:
    assert found.positions == expected.positions
    assert found.num_rows == expected.num_rows
    for layer in range(len(found._counts)):
        torch.testing.assert_close(found.values(layer), expected.values(layer), rtol=1e-4, atol=1e-4)


REQUESTS = (
    Request((0, 1, 2), 4, (11,)),
    Request((), 0, (12, 13, 14, 15, 16)),
    Request((3,), 2, (17,), group=True),
    Request((2, 0), 0, (18, 19, 20)),
    Request((4, 4), 30, (21,)),
)


@pytest.mark.parametrize(
    "family", ["llama", "mistral-window", "gemma3", "gpt_oss", "cohere2", "deepseek_v3", "gemma2"]
)
def test_a_shared_pass_is_everybodys_own(family: str) -> None:
    softcapped = family == "gemma2"
    requests = [r for r in REQUESTS if not (r.group and softcapped)]
    wants, alone = ([r.want(family) for r in requests] for _ in range(2))
    with torch.inference_mode():
        found = Passes(model(family), 99).run(wants)
        expected = [want.read(model(family)) for want in alone]
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_same_read(mine, theirs)
        assert_same_rows(wants[i].fresh, alone[i].fresh)


DRAWN = st.builds(
    Request,
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.integers(0, 5),
    st.lists(st.integers(10, 270), min_size=1, max_size=6).map(tuple),
    st.booleans(),
)


@given(st.lists(DRAWN, min_size=2, max_size=5))
@settings(max_examples=25, deadline=None)
def test_any_requests_can_share_a_pass(requests: list[Request]) -> None:
    wants, alone = ([r.want() for r in requests] for _ in range(2))
    for mine, other in zip(Passes(model(), 99).run(wants), alone, strict=True):
        assert_same_read(mine, other.read(model()))


def test_a_pass_of_one_is_that_one_bit_for_bit() -> None:
    for request in REQUESTS:
        (found,) = Passes(model(), 99).run([request.want()])
        expected = request.want().read(model())
        assert isinstance(found, Read)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.mass, expected.mass)


# ---- one launch for several


def launched(requests: Sequence[Request], family: str = "llama", kernels: str = "triton") -> list[int]:
    """How many requests each launch took; all of them get what they would get alone."""
    wants, alone = ([r.want(family) for r in requests] for _ in range(2))
    sizes: list[int] = []
    run = launch.StaticAttention.__call__

    def counted(self: launch.StaticAttention, query: torch.Tensor) -> Attended:
        sizes.append(query.shape[0])
        return run(self, query)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), using(kernels):  # type: ignore[arg-type]
        patch.setattr(launch.StaticAttention, "__call__", counted)
        found = Passes(model(family), 99).run(wants)
    for i, (mine, other) in enumerate(zip(found, alone, strict=True)):
        assert_same_read(mine, other.read(model(family)))
        assert_same_rows(wants[i].fresh, other.fresh)
    return sizes


WRITING = (
    Request((0, 1, 2), 4, (11,)),
    Request((), 3, (12,)),
    Request((4, 4), 30, (13,)),
    Request((2, 0), 0, (18, 19, 20)),
    Request((1,), 0, (21, 22, 23)),
)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "deepseek_v3"])
def test_requests_of_as_many_tokens_attend_in_one_launch(family: str) -> None:
    sizes = launched(WRITING, family)
    if family in ("llama", "deepseek_v3"):  # the others' windows are each request's own
        assert sizes == [3, 2] * model(family).num_layers
    assert {2, 3} <= set(sizes)


def test_only_kernels_share_launches() -> None:
    assert launched(WRITING, kernels="cpu") == []


def test_who_is_looked_at_closely_attends_alone() -> None:
    sizes = launched([*WRITING[:3], Request((3,), 2, (17,), group=True)])
    assert sizes == [3, 1] * model().num_layers


def test_a_failure_in_a_shared_launch_is_its_own_requests_alone() -> None:
    wants, alone = ([r.want() for r in WRITING] for _ in range(2))
    bad = wants[1]
    wants[1] = Want(Failing(SegmentTable(), 2), bad.tokens, bad.positions, bad.fresh)
    with using("triton"):
        found = Passes(model(), 99).run(wants)
    assert isinstance(found[1], CacheMiss)
    for i in (0, 2, 3, 4):
        assert_same_read(found[i], alone[i].read(model()))


def test_when_a_shared_launch_fails_everybody_attends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wants, alone = ([r.want() for r in WRITING] for _ in range(2))
    run = launch.StaticAttention.__call__

    def scarce(self: launch.StaticAttention, query: torch.Tensor) -> Attended:
        if query.shape[0] > 1:
            raise RuntimeError("out of memory")
        return run(self, query)

    monkeypatch.setattr(launch.StaticAttention, "__call__", scarce)
    with using("triton"):
        found = Passes(model(), 99).run(wants)
    for mine, other in zip(found, alone, strict=True):
        assert_same_read(mine, other.read(model()))


# ---- failures


class Failing:
    """Tables of which one layer cannot be had."""

    def __init__(self, table: SegmentTable, layer: int) -> None:
        self.table, self.layer = table, layer

    def at(self, layer: int) -> SegmentTable:
        if layer == self.layer:
            raise CacheMiss("damaged")
        return self.table

    def note(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_failure_is_its_own_requests_alone(layer: int) -> None:
    wants, alone = ([r.want() for r in REQUESTS] for _ in range(2))
    bad = wants[1]
    wants[1] = Want(Failing(SegmentTable(), layer), bad.tokens, bad.positions, bad.fresh)
    found = Passes(model(), 99).run(wants)
    assert isinstance(found[1], CacheMiss)
    assert bad.fresh.positions == []
    for i in (0, 2, 3, 4):
        assert_same_read(found[i], alone[i].read(model()))
    (again,) = Passes(model(), 99).run([Want(Failing(SegmentTable(), 1), (1,), (0,), FreshRows(4))])
    assert isinstance(again, CacheMiss)


def test_when_the_pass_itself_fails_everybody_is_read_alone(caplog: pytest.LogCaptureFixture) -> None:
    """As with too little memory for all of them; rows that it left in some layers are forgotten."""
    wants, alone = ([r.want() for r in REQUESTS] for _ in range(2))
    with torch.inference_mode():
        expected = [want.read(model()) for want in alone]
    deep = model().network.model.layers[2].mlp

    def scarce(module: Any, args: Sequence[torch.Tensor]) -> None:
        if args[0].shape[1] > 6:
            raise RuntimeError("out of memory")

    hook = deep.register_forward_pre_hook(scarce)
    try:
        found = Passes(model(), 99).run(wants)
        stateful = Want(Failing(SegmentTable(), 99), (11, 12, 13, 14), range(4), FreshRows(4))
        lost, kept = Passes(model(), 99).run([stateful, REQUESTS[3].want()])
    finally:
        hook.remove()
    for i, theirs in enumerate(expected):
        assert_same_read(found[i], theirs)
        assert_same_rows(wants[i].fresh, alone[i].fresh)
    assert f"a pass of {len(wants)} requests failed, each is read alone" in caplog.text
    assert isinstance(lost, RuntimeError)
    assert isinstance(kept, Read)


# ---- who is next


def chosen(sizes: Sequence[int], limit: int) -> list[int]:
    nothing = FreshRows(1)
    wants = [Want(SegmentTable(), (1,) * n, range(n), nothing) for n in sizes]
    return Passes(model(), limit).choose(wants)


def test_single_tokens_are_all_read_and_of_longer_ones_what_fits() -> None:
    assert chosen([1, 1, 1], 1) == [0, 1, 2]
    assert chosen([1, 50, 1, 50], 60) == [0, 1, 2]
    assert chosen([1, 50, 1, 10, 50], 60) == [0, 1, 2, 3]
    assert chosen([500, 1, 2], 60) == [0, 1]
    assert chosen([30, 30, 30], 60) == [0, 1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 50))
def test_somebody_always_has_a_turn_and_the_limit_holds(sizes: list[int], limit: int) -> None:
    found = chosen(sizes, limit)
    longer = [sizes[i] for i in found if sizes[i] > 1]
    assert set(range(len(sizes))) - set(found) == {
        i for i in range(len(sizes)) if i not in found and sizes[i] > 1
    }
    assert found == sorted(set(found))
    assert bool(longer) == any(n > 1 for n in sizes)
    assert sum(longer) <= limit or len(longer) == 1


def test_rows_read_without_an_engine_carry_no_gradients() -> None:
    network = model().network
    before = [p.requires_grad for p in network.parameters()]
    network.requires_grad_(True)
    try:
        (found,) = Caches(model(), None).documents((5, 6), [(7, 8, 9)])
        (kv,) = encode(model(), [(7, 8, 9)])
    finally:
        for parameter, was in zip(network.parameters(), before, strict=True):
            parameter.requires_grad_(was)
    for rows in (found.kv, kv):
        assert not any(x.keys.requires_grad or x.values.requires_grad for x in rows.layers)
