"""What PyTorch's own variable-length attention makes of a stride: the output alone, on a GPU.

Runs are sequences of one call, the query repeated and turned for each; the stride itself is a second call, as
a call is causal as a whole or not at all; partial outputs are merged by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag.memory.base import Run
from kvrag_kernels import Turn
from kvrag_kernels.turning import turn_query


def attend(
    query: torch.Tensor,
    memory: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    runs: Sequence[Run],
    turn: Turn,
    scale: float,
) -> torch.Tensor:
    """Output [1, H, T, D].

    Args:
        query: [1, H, T, D], not rotated.
        memory: keys and values of all slots, [1, K, n, D].
        own: those of the stride.
        runs: of slots, in any order.
        turn: for each run and for the stride itself.
        scale: factor on the scores.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn  # noqa: PLC0415 - not in every torch

    _, heads, num_rows, _ = query.shape
    turned = turn_query(query, turn, len(runs) + 1)[:, 0].transpose(1, 2)  # [S, T, H, D]
    order = sorted(range(len(runs)), key=lambda i: runs[i].slot)
    lengths = [runs[i].length for i in order]
    calls = [
        (turned[order], memory, [runs[i].slot for i in order], lengths, (-1, -1)),
        (turned[-1:], own, [0], [num_rows], (-1, 0)),
    ]
    outs, sums = [], []
    for q, (keys, values), starts, used, window in calls:
        count = len(starts)
        out, lse = varlen_attn(
            q.reshape(count * num_rows, heads, -1),
            keys[0].transpose(0, 1),
            values[0].transpose(0, 1),
            _integers([i * num_rows for i in range(count + 1)], query.device),
            _integers([*starts, keys.shape[2]], query.device),
            num_rows,
            max(used),
            scale=scale,
            enable_gqa=True,
            window_size=window,
            seqused_k=_integers(used, query.device),
            return_aux=AuxRequest(lse=True),
        )
        by_head = lse if lse.shape[0] == heads else lse.T  # documentation and operator do not agree
        outs.append(out.view(count, num_rows, heads, -1).transpose(1, 2))
        sums.append(by_head.reshape(heads, count, num_rows).transpose(0, 1))
    shares = torch.cat(sums).softmax(0)
    merged = torch.zeros_like(outs[-1][0], dtype=torch.float32)
    for out, share in zip(torch.cat(outs), shares, strict=True):
        merged.addcmul_(out.float(), share[..., None])
    return merged.to(query.dtype)[None]


def _integers(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32, device=device)
