"""What a pass of few tokens borrows from a model's linear layers, it gives back."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from kvrag.encoding import encode
from kvrag.fresh import FreshRows
from kvrag.linears import Linears
from kvrag.model import Model
from kvrag.prefill import Want
from kvrag.segments import Segment, SegmentTable
from kvrag.testing.models import randomize, tiny_tokenizer
from kvrag_kernels import using
from kvrag_kernels.linear import has_both

pytestmark = pytest.mark.skipif(not has_both(), reason="this PyTorch has one library only")


class _Own(nn.Linear):
    """Somebody's own layer."""


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 8), _Own(1024, 1024), nn.Linear(1024, 1100))


def _changed(network: nn.Module) -> list[str]:
    return [name for name, layer in network.named_modules() if "forward" in layer.__dict__]


def test_large_plain_layers_only_and_for_few_tokens_only() -> None:
    network = _network()
    linears = Linears(network)
    for num_tokens, expected in ((3, []), (4, ["0", "3"]), (257, [])):
        with linears.lent(num_tokens):
            assert _changed(network) == expected
        assert _changed(network) == []


def test_given_back_behind_an_error() -> None:
    network = _network()
    with pytest.raises(MemoryError), Linears(network).lent(8):
        raise MemoryError
    assert _changed(network) == []


def test_what_somebody_else_has_put_there_stays() -> None:
    network = _network()
    linears = Linears(network)
    hook = partial(torch.neg)
    network[0].forward = hook
    with linears.lent(8):
        assert _changed(network) == ["0", "3"]
        assert network[0].forward is hook
    assert network[0].forward is hook
    assert _changed(network) == ["0"]
    with linears.lent(8):
        network[3].forward = hook  # while it is lent
    assert _changed(network) == ["0", "3"]


def test_two_passes_at_once_do_not_take_from_each_other() -> None:
    network = _network()
    x = torch.randn(8, 1024)
    expected = network[0](x)
    one, two = Linears(network), Linears(network)
    with one.lent(8):
        with two.lent(8):
            assert _changed(network) == ["0", "3"]
        torch.testing.assert_close(network[0](x), expected)
    assert _changed(network) == []


def test_a_copy_made_within_computes_by_its_own_weights() -> None:
    network = _network()
    with Linears(network).lent(8):
        other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight.zero_()
        other[0].bias.zero_()
    assert not other[0](torch.ones(8, 1024)).any()


@pytest.mark.parametrize("num_tokens", [2, 7])
def test_a_model_reads_the_same(num_tokens: int) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1056, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Model(randomize(AutoModelForCausalLM.from_config(config), 3), tiny_tokenizer())
    assert len(Linears(model.network)._forwards) == 10
    document = encode(model, [[21, 22, 23]])[0]

    def read() -> torch.Tensor:
        table = SegmentTable((Segment(document, 0, document=0),))
        fresh = FreshRows(model.num_layers)
        want = Want(table, range(30, 30 + num_tokens), range(3, 3 + num_tokens), fresh, num_logits=0)
        return want.read(model).logits

    found = read()
    with using("reference"):
        expected = read()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert _changed(model.network) == []
