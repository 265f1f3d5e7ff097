"""A Llama's forward pass for training on a CPU: few autograd nodes.

Computes what `LlamaForCausalLM` computes, on the same parameters, faster for a model so small that much of
the time goes into element-wise work. Activations are [N, d] with N = B * T.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

# Rows of queries handled together: probabilities right of the diagonal block are never computed.
_BLOCK = 128


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> list[Tensor]:
    """The residual stream after each layer; the last one is what the final norm reads.

    Args:
        model: a Llama without attention biases.
        ids: [B, T], without padding; row i stands at positions 0..T-1.

    Returns:
        [B, T, d] for each layer, float32.
    """
    config: Any = model.config
    B, T = ids.shape
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cos, sin = _rope_tables(T, D, config.rope_parameters["rope_theta"])
    x = F.embedding(ids.reshape(-1), model.model.embed_tokens.weight)
    after = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = _norm(x, layer.input_layernorm.weight, config.rms_norm_eps)
        qkv = _matmul(h, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        q, k, v = torch.split(qkv.view(B, T, H + 2 * K, D), [H, K, K], 2)
        q, k = _apply(_Rope, q, cos, sin), _apply(_Rope, k, cos, sin)
        grouped = q.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B * K, H // K, T, D)
        k, v = (a.transpose(1, 2).reshape(B * K, T, D) for a in (k, v))
        o = _apply(_CausalAttention, grouped, k, v)
        o = o.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B * T, H * D)
        x = x + _matmul(o, attention.o_proj.weight)
        h = _norm(x, layer.post_attention_layernorm.weight, config.rms_norm_eps)
        h = _apply(_SwiGLU, _matmul(h, mlp.gate_proj.weight, mlp.up_proj.weight))
        x = x + _matmul(h, mlp.down_proj.weight)
        after.append(x.view(B, T, -1))
    return after


def logits(model: LlamaForCausalLM, hidden: Tensor) -> Tensor:
    """Logits [N, V] of selected rows [N, d] of `hidden_states`."""
    h = _norm(hidden, model.model.norm.weight, model.config.rms_norm_eps)
    return _matmul(h, model.lm_head.weight)


def _matmul(x: Tensor, *weights: Tensor) -> Tensor:
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    return x @ weight.t()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _apply(_RMSNorm, x, weight, eps)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


@lru_cache(maxsize=8)
def _rope_tables(T: int, D: int, theta: float) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(T).float(), theta ** (-torch.arange(0, D, 2).float() / D))
    return angles.cos()[:, None], angles.sin()[:, None]


class _RMSNorm(torch.autograd.Function):
    """[N, d] -> [N, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = torch.rsqrt(square.div_(x.shape[-1]).add_(eps))
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        grad_weight = torch.einsum("nd,nd->d", grad, normed)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).div_(normed.shape[-1]).unsqueeze(-1)
        return grad.addcmul_(normed, along, value=-1).mul_(scale), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """[N, 2f] gate and up side by side -> [N, f]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


class _Rope(torch.autograd.Function):
    """Rotate [B, T, heads, D], half-split layout; backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.tables = (cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.tables
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    a, b = x.chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_a, out_b = out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


class _CausalAttention(torch.autograd.Function):
    """q [Z, G, T, D] with k, v [Z, T, D] of Z = B * K key heads, each shared by G query heads.

    Probabilities are kept for the backward pass, block of rows by block of rows.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        Z, G, T, D = q.shape
        out = torch.empty_like(q)
        future = torch.full((_BLOCK, _BLOCK), -1e9).triu(1)
        kept = []
        for start in range(0, T, _BLOCK):
            end = min(T, start + _BLOCK)
            rows = q[:, :, start:end].reshape(Z, G * (end - start), D)
            scores = torch.bmm(rows, k[:, :end].mT).mul_(D**-0.5)
            scores.view(Z, G, end - start, end)[..., start:] += future[: end - start, : end - start]
            kept.append(scores.softmax(-1))
            out[:, :, start:end] = torch.bmm(kept[-1], v[:, :end]).view(Z, G, end - start, D)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        Z, G, T, D = q.shape
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, p in enumerate(kept):
            start, end = i * _BLOCK, min(T, (i + 1) * _BLOCK)
            rows = q[:, :, start:end].reshape(Z, G * (end - start), D)
            grad_rows = grad[:, :, start:end].reshape(Z, G * (end - start), D)
            grad_v[:, :end] += torch.bmm(p.mT, grad_rows)
            grad_p = torch.bmm(grad_rows, v[:, :end].mT)
            grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(D**-0.5)
            grad_q[:, :, start:end] = torch.bmm(grad_s, k[:, :end]).view(Z, G, end - start, D)
            grad_k[:, :end] += torch.bmm(grad_s.mT, rows)
        return grad_q, grad_k, grad_v
