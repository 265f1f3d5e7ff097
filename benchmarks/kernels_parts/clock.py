"""How long something takes on a device: medians of repeated runs, caches swept between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch

_SWEEP_BYTES = 256 << 20  # more than any L2 cache


def seconds(run: Callable[[], object], device: torch.device, *, repeat: int = 20, warm: int = 3) -> float:
    """Median seconds of one run.

    Args:
        run: what is measured; called `warm` times before.
        device: where it computes; CUDA devices are timed by their own events.
        repeat: measured runs.
        warm: runs before, which compile and allocate.
    """
    for _ in range(warm):
        run()
    if device.type != "cuda":
        return median(_by_wall(run) for _ in range(repeat))
    torch.cuda.synchronize(device)
    return median(_by_events(run, device) for _ in range(repeat))


def turns(
    sides: dict[str, Callable[[], object]], device: torch.device, *, repeat: int = 20
) -> dict[str, float]:
    """Median seconds of several sides that take turns, so that a disturbance hits all of them alike."""
    once = _by_wall if device.type != "cuda" else lambda run: _by_events(run, device)
    for run in sides.values():
        for _ in range(3):
            run()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, run in sides.items():
            found[name].append(once(run))
    return {name: median(times) for name, times in found.items()}


def _by_wall(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _by_events(run: Callable[[], object], device: torch.device) -> float:
    _sweeper(device).zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _sweeper(device: torch.device) -> torch.Tensor:
    """Memory that is written between two runs, so that none finds its rows in the L2 cache."""
    return torch.empty(_SWEEP_BYTES, dtype=torch.uint8, device=device)
