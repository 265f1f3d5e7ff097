"""How segment attention's work is best cut on this GPU: what `tuning_for` chooses, and the best found."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from kernels_parts.clock import replayed, seconds
from kernels_parts.limits import limits
from kernels_parts.segment import LLAMA, QWEN, Case

from kvrag_kernels._backend import backend

NAME = "tuning"


def run(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """One row per shape: chosen and best; nothing without a GPU, where no kernel is compiled."""
    if device.type != "cuda" or backend(device) != "triton":
        return []
    cases = [Case(s, q, 32_768, 32, device) for s in (LLAMA, QWEN) for q in (1, 16, 64, 256)]
    return [_tuned(case, device, small) for case in cases[: 1 if small else None]]


def _tuned(case: Case, device: torch.device, small: bool) -> dict[str, Any]:
    from kvrag_kernels.segment_attention.launch import StaticAttention, Tuning  # noqa: PLC0415 - needs Triton

    def timed(tuning: Tuning | None) -> tuple[float, Tuning]:
        made = StaticAttention(case.query, [case.segments], [case.turn], scale=case.scale, tuning=tuning)
        run = replayed(lambda: made(case.query), device)
        return seconds(run, device, repeat=10), made.tuning

    taken, chosen = timed(None)
    packed = case.shape.heads // case.shape.kv_heads * case.num_queries
    choices = product(
        [q for q in (16, 32, 64, 128) if q <= max(16, 2 * packed)],
        (32, 64, 128),
        (1, 2, 3, 4),
        (4, 8),
        (2, 3, 4),
    )
    found = []
    for queries, block, rounds, warps, stages in list(choices)[: 3 if small else None]:
        splits = max(1, chosen.splits * rounds // 2)
        tuning = Tuning(queries, block, splits, chosen.merged, warps, stages)
        try:
            found.append(timed(tuning))
        except Exception as error:  # too much shared memory is one of the answers
            if "out of resource" not in str(error):
                raise
    best, how = min(found, key=lambda pair: pair[0])
    least = limits(device, small).seconds(case.num_bytes, case.num_flops, case.query.dtype)
    return {
        "shape": case.shape.name,
        "queries": case.num_queries,
        "chosen": str(chosen),
        "chosen of the limit": least / taken,
        "best": str(how),
        "best of the limit": least / best,
    }
