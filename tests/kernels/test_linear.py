"""Linear layers of few rows: what PyTorch's own give, whoever computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from kvrag_kernels import linear as module
from kvrag_kernels import using
from kvrag_kernels.linear import has_both, is_few, is_large, linear

needs_both = pytest.mark.skipif(not has_both(), reason="this PyTorch has one library only")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of the calls that the other library gets."""
    rows: list[int] = []
    real = torch.ops.mkldnn._linear_pointwise

    class Ops:
        @staticmethod
        def _linear_pointwise(x: torch.Tensor, *others: object) -> torch.Tensor:
            rows.append(x.numel() // x.shape[-1])
            found: torch.Tensor = real(x, *others)
            return found

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "mkldnn", Ops)
        yield rows


def _weights(wide: int = 1030, out: int = 1027, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(out, wide) / wide**0.5).to(dtype)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 16, 33, 256, 257])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_equals_float64(num_rows: int, has_bias: bool) -> None:
    x, weight = torch.randn(1, num_rows, 1030), _weights()
    bias = torch.randn(1027) if has_bias else None
    exact = F.linear(x.double(), weight.double(), bias.double() if bias is not None else None)
    with torch.inference_mode():
        found = linear(x, weight, bias)
    assert found.dtype is torch.float32
    assert ((found - exact).norm() / exact.norm()) < 1e-6


@needs_both
def test_few_rows_by_large_weights_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = _weights(), _weights(64, 64)
    with torch.inference_mode(), counted(monkeypatch) as rows:
        for num_rows in (1, 3, 4, 256, 257):
            linear(torch.randn(num_rows, 1030), large)
        linear(torch.randn(8, 64), small)
        with using("reference"):
            linear(torch.randn(8, 1030), large)
        linear(torch.randn(8, 1030).bfloat16(), large.bfloat16())
        linear(torch.randn(0, 1030), large)
    assert rows == [4, 256]
    assert (is_few(4), is_few(3), is_large(large), is_large(small)) == (True, False, True, False)


@needs_both
def test_rows_that_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weights()
    x = torch.randn(1030, 9).T[::2]
    with torch.inference_mode(), counted(monkeypatch) as rows:
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert rows == [5]


def test_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weights().requires_grad_()
    with counted(monkeypatch) as rows:
        linear(torch.randn(8, 1030), weight).sum().backward()
    assert weight.grad is not None
    assert rows == []


def test_without_the_operator_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        """An older or other build."""

    has_both.cache_clear()
    x, weight = torch.randn(8, 1030), _weights()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "mkldnn", Empty())
            assert not module.has_both()
            assert torch.equal(linear(x, weight), F.linear(x, weight))
    finally:
        has_both.cache_clear()
