"""Which entries should go when a tier is full: a recorded trace of retrievals, replayed under every rule.

Budgets are shares of the working set: the bytes of all documents that are asked for at all. An entry's bytes
are its tokens; reading one anew costs what a model of 0.5B parameters computes for it, plus a fixed part.

    python benchmarks/eviction.py                       # prints the table, writes docs/data/eviction.json
    python benchmarks/eviction.py --record FOLDER           # records the trace anew, then the same
    python benchmarks/eviction.py --smoke               # seconds; writes nothing
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eviction_parts.policies import Make, makers
from eviction_parts.trace import TRACE, Trace, load

RESULT = TRACE.with_name("eviction.json")
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
# Operations of a prefill: linear in the tokens (parameters), quadratic (attention: layers x width), and what
# a forward pass costs whatever it reads. In tokens of the linear part; only ratios matter.
_FIXED, _QUADRATIC = 30.0, 1 / 12_000


def cost(tokens: int) -> float:
    """What reading a document anew takes, in any unit."""
    return _FIXED + tokens + _QUADRATIC * tokens**2


def replay(trace: Trace, order: str, share: float, make: Make) -> dict[str, float]:
    """Rates of hits, of bytes and of costs that were saved."""
    requests = trace.requests(order)
    costs = [cost(size) for size in trace.sizes]
    budget = int(share * sum(trace.sizes[d] for d in set(requests)))
    cache = make(budget, trace.sizes, costs, requests)
    found = [cache.ask(document) for document in requests]

    def rate(weights: Sequence[float]) -> float:
        hit = sum(weights[d] for d, is_hit in zip(requests, found, strict=True) if is_hit)
        return hit / sum(weights[d] for d in requests)

    return {"hits": rate([1] * len(costs)), "bytes": rate(trace.sizes), "costs": rate(costs)}


def measure(trace: Trace, shares: Sequence[float]) -> dict[str, Any]:
    """Every rule under every order and budget."""
    results: dict[str, Any] = {}
    for order in trace.orders:
        results[order] = {
            name: {f"{share:g}": replay(trace, order, share, make) for share in shares}
            for name, make in makers().items()
        }
    return results


def show(results: dict[str, Any], shares: Sequence[float]) -> None:
    """A table per order: bytes found, and hits in brackets, in per cent."""
    for order, rules in results.items():
        print(f"\n{order:26}" + "".join(f"{share:>16.0%}" for share in shares))
        for name, rates in rules.items():
            cells = (rates[f"{share:g}"] for share in shares)
            print(f"{name:26}" + "".join(f"{100 * c['bytes']:9.1f} ({100 * c['hits']:4.1f})" for c in cells))


def main() -> None:
    """Replay, print, and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="record the trace from the data there")
    parser.add_argument("--smoke", action="store_true", help="a part of the trace, two budgets")
    args = parser.parse_args()
    if args.record:
        from eviction_parts.record import record  # noqa: PLC0415  # needs Chroma and minutes

        record(args.record).save(TRACE)
    trace = load()
    if args.smoke:
        some = {name: asked[:400] for name, asked in trace.orders.items()}
        show(measure(Trace(trace.made, trace.sizes, trace.found, some), SHARES[1:3]), SHARES[1:3])
        return
    results = measure(trace, SHARES)
    show(results, SHARES)
    requests = {order: len(trace.requests(order)) for order in trace.orders}
    asked = {order: len(set(trace.requests(order))) for order in trace.orders}
    conditions = {
        **trace.made,
        "documents": len(trace.sizes),
        "requests": requests,
        "documents_asked_for": asked,
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULT.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
