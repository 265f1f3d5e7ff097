"""How long something takes on a device: medians of repeated runs, caches swept between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch

_SWEEP_BYTES = 256 << 20  # more than any L2 cache


def is_alone(device: torch.device) -> bool:
    """Whether one thread of a CPU does all the work."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def now(device: torch.device) -> float:
    """Seconds; on one CPU thread those of this process, since whatever else runs would be counted, too."""
    return time.process_time() if is_alone(device) else time.perf_counter()


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
        return median(_by_clock(run, device) for _ in range(repeat))
    torch.cuda.synchronize(device)
    return median(_by_events(run, device) for _ in range(repeat))


def turns(
    sides: dict[str, Callable[[], object]], device: torch.device, *, repeat: int = 20
) -> dict[str, float]:
    """Median seconds of several sides that take turns, so that a disturbance hits all of them alike."""
    once = _by_clock if device.type != "cuda" else _by_events
    for run in sides.values():
        for _ in range(3):
            run()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, run in sides.items():
            found[name].append(once(run, device))
    return {name: median(times) for name, times in found.items()}


def replayed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work without Python's part of it: captured once as a CUDA graph, and then replayed.

    Launching a kernel from Python takes longer than many kernels do. Elsewhere, and where the work cannot be
    captured, what was given.
    """
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, allocates
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"not captured: {error}")
        return run
    return graph.replay


def _by_clock(run: Callable[[], object], device: torch.device) -> float:
    started = now(device)
    run()
    return now(device) - started


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
