"""Answers that are written side by side over copied rows: each token is what it would be alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from kvrag.abreast import Abreast, is_abreast
from kvrag.attention import Looking
from kvrag.backbone import AttentionCall
from kvrag.encoding import encode
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.passes import Passes
from kvrag.prefill import Read, Want
from kvrag.segments import KV, Segment, SegmentTable
from kvrag.testing.models import tiny
from kvrag.testing.reads import assert_same_read

LENGTHS = ((3, 5), (4,), (2, 1, 6))  # of the documents of each request
FAMILIES = ["llama", "qwen3", "deepseek_v3", "gpt_neox"]


@cache
def model(family: str = "llama") -> Model:
    return tiny(family)


@cache
def rows(number: int, family: str) -> KV:
    (kv,) = encode(model(family), [[20 + number + i for i in range(number)]])
    return kv


def copied(lengths: tuple[int, ...], family: str = "llama", *, before: int = 2) -> FreshRows:
    """Rows of documents and of the tokens behind them, in one run."""
    segments, at = [], 0
    for i, length in enumerate(lengths):
        segments.append(Segment(rows(length, family), at, document=i))
        at += length
    table, fresh = SegmentTable(tuple(segments)), FreshRows(model(family).num_layers)
    Want(table, range(30, 30 + before), range(at, at + before), fresh).read(model(family))
    return fresh.behind(table, model(family).specs)


def wants(family: str = "llama") -> list[Want]:
    found = []
    for i, lengths in enumerate(LENGTHS):
        fresh = copied(lengths, family)
        found.append(Want(SegmentTable(), [40 + i], [sum(lengths) + 2], fresh))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_everybody_gets_what_he_would_get_alone(family: str, caplog: pytest.LogCaptureFixture) -> None:
    mine, others = wants(family), wants(family)
    assert all(is_abreast(model(family), want) for want in mine)
    for step in range(3):
        found = Passes(model(family), 99).run(mine)
        expected = [other.read(model(family)) for other in others]
        for one, other, want, alone in zip(found, expected, mine, others, strict=True):
            assert_same_read(one, other)
            assert want.fresh.positions == alone.fresh.positions
            for layer in range(model(family).num_layers):
                torch.testing.assert_close(
                    want.fresh.values(layer), alone.fresh.values(layer), rtol=1e-4, atol=1e-4
                )
        position = [want.positions[0] + 1 for want in mine]
        mine, others = (
            [Want(SegmentTable(), [50 + step], [at], w.fresh) for w, at in zip(group, position, strict=True)]
            for group in (mine, others)
        )
    assert caplog.text == ""  # nobody was read alone because the pass itself failed


def test_longer_ones_and_others_share_the_pass() -> None:
    def everybody() -> list[Want]:
        one, two, three = wants()
        table = SegmentTable((Segment(rows(5, "llama"), 0, document=0),))
        prompt = Want(table, [11, 12, 13], [5, 6, 7], FreshRows(model().num_layers))
        looked = Want(SegmentTable(), [40], [10], copied((8,)), Looking())
        return [one, prompt, two, looked, three]

    mine, others = everybody(), everybody()
    assert [is_abreast(model(), want) for want in mine] == [True, False, True, False, True]
    for found, other in zip(Passes(model(), 99).run(mine), others, strict=True):
        assert_same_read(found, other.read(model()))


def test_half_precision_is_rounded_once() -> None:
    half = tiny("llama", dtype=torch.bfloat16)
    table = SegmentTable((Segment(encode(half, [[21, 22, 23]])[0], 0, document=0),))

    def want(token: int) -> Want:
        fresh = FreshRows(half.num_layers)
        Want(table, [5, 6], [3, 4], fresh).read(half)
        return Want(SegmentTable(), [token], [5], fresh.behind(table, half.specs))

    found = Passes(half, 99).run([want(7), want(8)])
    for token, read in zip((7, 8), found, strict=True):
        assert isinstance(read, Read)
        torch.testing.assert_close(read.logits, want(token).read(half).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_failure_is_its_own_requests_alone(layer: int) -> None:
    class Full(FreshRows):
        """Rows that run out of memory in one layer."""

        def append(
            self, at: int, keys: torch.Tensor, values: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if at == layer:
                raise MemoryError("no room")
            return super().append(at, keys, values)

    mine, others = wants(), wants()
    mine[1].fresh.__class__ = Full
    first, failed, last = Passes(model(), 99).run(mine)
    assert isinstance(failed, MemoryError)
    assert mine[1].fresh.positions == others[1].fresh.positions
    assert_same_read(first, others[0].read(model()))
    assert_same_read(last, others[2].read(model()))


def test_only_single_tokens_over_one_run_that_every_layer_sees() -> None:
    one = wants()[0]
    table = SegmentTable((Segment(rows(5, "llama"), 0, document=0),))
    fresh = FreshRows(model().num_layers)
    assert is_abreast(model(), one)
    assert not is_abreast(model(), Want(one.table, [1, 2], [9, 10], one.fresh))
    assert not is_abreast(model(), Want(table, [1], [9], fresh))
    assert not is_abreast(tiny("mistral-window"), one)


def test_rows_that_were_not_copied_are_refused() -> None:
    fresh = FreshRows(model().num_layers)
    abreast = Abreast(model(), [Want(SegmentTable(), [1], [0], fresh)], [0])
    call = AttentionCall(
        torch.ones(1, 4, 1, 16), torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), 1.0, None, None, None
    )
    assert not abreast.attend(0, call).any()
    error = abreast.found(0, torch.zeros(1, 3))
    assert isinstance(error, ValueError)
    assert "not copied together" in str(error)
