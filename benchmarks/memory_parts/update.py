"""How long a memory takes to decide what stays when a stride comes in; no rows are moved.

Compares `cascade_update` with the token-by-token definition of it on full rings, and times a whole `take` of
every policy: scores brought up to date, survivors decided, ids and scores moved.

    python benchmarks/memory_parts/update.py        # 32 layers, 8 heads, a budget of 16,384; a minute
    python benchmarks/memory_parts/update.py --smoke  # seconds
    python benchmarks/memory_parts/update.py --json FILE  # writes the figures, too
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvrag.memory.base import MemoryPolicy, MemoryState, Seen
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.ladder import Ladder
from kvrag.memory.window import Window
from kvrag_kernels import cascade_update, cascade_update_reference


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured."""

    layers: int = 32
    kv_heads: int = 8
    budget: int = 16_384
    strides: tuple[int, ...] = (1, 64, 512, 4096)
    repeats: int = 7


SMOKE = Sizes(layers=4, kv_heads=2, budget=1024, strides=(1, 64, 1024), repeats=3)


def policies(sizes: Sizes) -> list[MemoryPolicy]:
    """Those with a budget."""
    return [
        Window(sizes.budget),
        Cascade(sizes.budget),
        LadderCascade(sizes.budget),
        Ladder(sizes.budget, span=sizes.layers // 2),
    ]


def milliseconds(
    work: Callable[[], object], repeats: int, prepare: Callable[[], object] = lambda: None
) -> float:
    """Median of several runs after one that does not count; `prepare` runs before each and is not timed."""
    times = []
    for _ in range(repeats + 1):
        prepare()
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[1:])


def attention(state: MemoryState, num_new: int) -> Seen | None:
    """Random scores in the shape that the state asks for."""
    if state.watching is None:
        return None
    return Seen(torch.rand(state.ids.shape), torch.rand(*state.ids.shape[:2], num_new))


def filled(policy: MemoryPolicy, sizes: Sizes) -> MemoryState:
    """A memory that has seen three times its budget and a bit."""
    state = policy.start(sizes.layers, sizes.kv_heads)
    for stride in (sizes.budget, sizes.budget, sizes.budget + 77):
        state.take(stride, attention(state, stride))
    return state


def takes(sizes: Sizes) -> list[dict[str, Any]]:
    """Milliseconds of `take`, by policy and stride."""
    rows = []
    for policy in policies(sizes):
        state = filled(policy, sizes)
        for stride in sizes.strides:
            seen = attention(state, stride)
            took = milliseconds(lambda: state.take(stride, seen), sizes.repeats)  # noqa: B023 - runs at once
            rows.append(
                {"policy": policy.name, "stride": stride, "ms": took, "us_per_token": 1e3 * took / stride}
            )
    return rows


def updates(sizes: Sizes) -> list[dict[str, Any]]:
    """Milliseconds of the decision alone, at once and token by token, and their ratio."""
    policy = Cascade(sizes.budget)
    width = (policy.budget - policy.sinks) // policy.sub_caches
    rows = []
    for stride in sizes.strides:
        scores = torch.rand(sizes.layers, sizes.kv_heads, width * policy.sub_caches)
        given = (
            scores,
            torch.rand(sizes.layers, sizes.kv_heads, stride),
            (width,) * policy.sub_caches,
            (5, 7, 9, 11),
            10**7,
        )
        options = {"periods": policy.periods, "width": width}
        found, expected = cascade_update(*given, **options), cascade_update_reference(*given, **options)
        assert torch.equal(found.sources, expected.sources)
        fast = milliseconds(lambda: cascade_update(*given, **options), sizes.repeats)  # noqa: B023
        slow = milliseconds(lambda: cascade_update_reference(*given, **options), 1)  # noqa: B023
        rows.append({"stride": stride, "ms": fast, "reference_ms": slow, "ratio": slow / fast})
    return rows


def measure(sizes: Sizes) -> dict[str, Any]:
    """All figures, and under which conditions they were taken."""
    conditions = {
        "sizes": asdict(sizes),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    return {"conditions": conditions, "updates": updates(sizes), "takes": takes(sizes)}


def show(figures: dict[str, Any]) -> None:
    """Two tables."""
    print(f"{'stride':>8}{'at once, ms':>14}{'one by one, ms':>16}{'ratio':>9}")
    for row in figures["updates"]:
        print(f"{row['stride']:8}{row['ms']:14.2f}{row['reference_ms']:16.1f}{row['ratio']:9.0f}")
    print(f"\n{'policy':>10}{'stride':>8}{'take, ms':>11}{'us a token':>12}")
    for row in figures["takes"]:
        print(f"{row['policy']:>10}{row['stride']:8}{row['ms']:11.2f}{row['us_per_token']:12.1f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where figures go, too")
    args = parser.parse_args()
    figures = measure(SMOKE if args.smoke else Sizes())
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
