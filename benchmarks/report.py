"""Writes the pages of measurements from docs/data; --smoke only says whether they are up to date.

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kernels_parts import page as kernels_page
from memory_parts import page as memory_page
from peers_parts import page as peers_page
from quality_parts import page as quality_page
from store_parts import page as store_page

ROOT = Path(__file__).parent.parent
DATA = ROOT / "docs" / "data"
STORE, PEERS = DATA / "store.json", DATA / "peers.json"
QUALITY, REAL_TEXT = DATA / "quality.json", DATA / "real_text.json"
KERNELS, KERNELS_GPU, BATCH = DATA / "kernels-cpu.json", DATA / "kernels-gpu.json", DATA / "batch.json"
MEMORY, MEMORY_TIME, SOAK = DATA / "memory.json", DATA / "memory-time.json", DATA / "soak.json"

_TTFT_ROWS = (
    ("full prefill, transformers' `generate`", "full_prefill", None),
    ("prebuilt caches, files in the page cache", "cached_warm", "ratio_warm"),
    ("prebuilt caches, page cache dropped", "cached_cold", "ratio_cold"),
    ("of the above, loading and verifying (warm)", "load_and_verify", None),
    ("floor: the question alone, no documents", "question_alone", "ratio_floor"),
    ("one decoded token, transformers' `generate`", "decode_ordinary", None),
    ("one decoded token, kvrag", "decode", "ratio_decode"),
)


def ttft(files: list[Path]) -> list[str]:
    """A table per measured configuration."""
    lines = ["## Time to first token", ""]
    for file in files:
        data: dict[str, Any] = json.loads(file.read_text())
        made, found = data["conditions"], data["seconds_and_ratios"]
        lines += [
            f"### {made['parameters'] / 1e6:.0f}M parameters, {made['dtype']}, {made['device']}",
            "",
            f"{made['documents']} documents of {made['document_tokens']} tokens, a question of "
            f"{made['question_tokens']}; random weights, {made['shape']['layers']} layers, "
            f"{made['shape']['hidden']} wide, {made['shape']['kv_heads']} key heads; "
            f"{made['store_bytes'] / 2**20:.0f} MiB of caches. {made['threads']} threads "
            f"({made['cpu_capability']}), torch {made['torch']}, transformers {made['transformers']}, "
            f"Python {made['python']}, {made['date']}. Full prefill: {made['full_repeat']} runs; "
            f"from caches: {made['repeat']} runs.",
            "",
            "| | median | |",
            "|---|---:|---:|",
        ]
        for title, name, ratio in _TTFT_ROWS:
            times = f"{found[ratio]:.1f}x" if ratio else ""
            lines.append(f"| {title} | {found[name] * 1e3:,.0f} ms | {times} |")
        lines.append("")
    lines += [
        "Both sides take turns in one process. The cached side begins with the store's closed files and ends",
        "with the chosen token; every byte loaded is verified. Made by",
        "`python benchmarks/ttft.py --json FILE`, for bfloat16 with `--dtype bfloat16`.",
        "",
    ]
    return lines


def store(data: dict[str, Any]) -> list[str]:
    """The section on the store."""
    return [
        "## The store on disk",
        "",
        "Made by `python benchmarks/store.py --json docs/data/store.json`. Sides take turns in one run; the",
        "disk is virtual. Reading and writing: on a quiet machine; the rest while others used it, with less",
        "priority but not none. Medians, and beside them the run disturbed least. `benchmarks/LOG.md` says",
        "how far runs differ: cold reads by a factor of two.",
        "",
        *store_page.lines(data),
    ]


def eviction(data: dict[str, Any]) -> list[str]:
    """Bytes and requests found by each rule, by budget."""
    made, results = data["conditions"], data["results"]
    shares = list(next(iter(next(iter(results.values())).values())))
    lines = ["## Eviction", ""]
    for order, rules in results.items():
        lines += [
            f"### Order of the questions: {order}",
            "",
            "| budget, of the working set | " + " | ".join(f"{float(share):.0%}" for share in shares) + " |",
            "|---|" + "---:|" * len(shares),
        ]
        for name, rates in rules.items():
            cells = [f"{100 * rates[s]['bytes']:.1f} ({100 * rates[s]['hits']:.1f})" for s in shares]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    number = next(iter(made["requests"].values()))
    return [
        *lines,
        "Bytes found, in per cent of the bytes asked for; in brackets hits, in per cent of the requests.",
        f"{number:,} requests in each order, of {made['documents']:,} documents.",
        f"Recorded from {made['data']};",
        f"by {made['search']}; lengths by a {made['tokens']}.",
        f"Orders: {made['orders']}.",
        "`gdsf`, `lfu-da` and `lru` run in the code of the memory tier.",
        "Made by `python benchmarks/eviction.py`.",
        "",
    ]


def measured() -> str:
    """The page of speed."""
    lines = ["# Measured", "", "<!-- written by benchmarks/report.py from docs/data; do not edit -->", ""]
    lines += ttft(sorted(DATA.glob("ttft-*.json")))
    if STORE.exists():
        lines += store(json.loads(STORE.read_text()))
    lines += eviction(json.loads((DATA / "eviction.json").read_text()))
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Every page whose figures are there."""
    docs = ROOT / "docs"
    made = {docs / "measured.md": measured()}
    if QUALITY.exists():
        made[docs / "quality.md"] = "\n".join(quality_page.lines(*map(read, (QUALITY, REAL_TEXT))))
    if KERNELS.exists():
        made[docs / "kernels.md"] = kernels_page.page(*map(read, (KERNELS, KERNELS_GPU, BATCH)))
    if MEMORY.exists():
        found = memory_page.lines(*map(read, (MEMORY, MEMORY_TIME, SOAK)))
        made[docs / "memory-measured.md"] = "\n".join(found)
    if PEERS.exists():
        comparison = docs / "comparison.md"
        made[comparison] = with_section(comparison.read_text(), "peers.json", peers_page.lines(read(PEERS)))
    return made


def with_section(page: str, name: str, lines: list[str]) -> str:
    """A page written by hand, with the section that is made from a file of docs/data between its marks."""
    begin = f"<!-- from docs/data/{name} by benchmarks/report.py; do not edit -->\n"
    end = f"<!-- end of {name} -->\n"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(
            f"no section for {name}: {begin.strip()} and {end.strip()} have to stand on lines of their own"
        )
    return "\n".join([f"{before}{begin}", *lines, f"\n{end}{after}"])


def read(file: Path) -> Any:
    """What was measured; None: it was not."""
    return json.loads(file.read_text()) if file.exists() else None


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="compare only; exit status 1 if a page is stale")
    args = parser.parse_args()
    for path, made in pages().items():
        if not args.smoke:
            path.write_text(made)
        elif not path.exists() or path.read_text() != made:
            name = path.relative_to(ROOT)
            sys.exit(f"{name} is not what docs/data says; run: python benchmarks/report.py")


if __name__ == "__main__":
    main()
