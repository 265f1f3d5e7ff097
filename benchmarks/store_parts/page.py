"""The figures of the store as a page: rates beside those of dd, floors, and how far from them."""

from __future__ import annotations

from typing import Any

_READING = (
    ("`dd`, buffered, one file", "dd"),
    ("`dd iflag=direct`, one file", "dd_direct"),
    ("store, documents side by side, every byte verified", "store"),
    ("store, one document after another", "store_one_by_one"),
    ("store, layer by layer, the next one asked for", "store_by_layer"),
    ("store, layer by layer, each when it is touched", "store_by_layer_no_look_ahead"),
    ("store, `direct=True`", "store_direct"),
    ("`torch.load`, a file per document", "torch"),
    ("safetensors, a tensor per layer, a file per document", "safetensors"),
)
_WRITING = (
    ("`dd conv=fsync`, one file", "dd"),
    ("store, `put_many`", "store"),
    ("store, one `put` after another", "store_one_by_one"),
    ("`torch.save` and sync, a file per document", "torch"),
    ("safetensors and sync, a file per document", "safetensors"),
)
_ANSWERING = (
    ("floor: the question alone", "question_alone"),
    ("from memory", "memory"),
    ("from files in the page cache", "disk_warm"),
    ("from files in the page cache, by layer", "disk_by_layer_warm"),
    ("from files, page cache dropped", "disk_cold"),
    ("from files, page cache dropped, by layer", "disk_by_layer_cold"),
)
_MANY = (
    ("open and count", "open_and_stats"),
    ("`get`, median", "get_p50"),
    ("`get`, 99th percentile", "get_p99"),
    ("`in`, median", "contains_p50"),
    ("`in`, 99th percentile", "contains_p99"),
    ("`stats`", "stats"),
    ("list all", "list_all"),
    ("`sweep`", "sweep"),
    ("build the index from the files", "rebuild_index"),
)

Data = dict[str, Any]


def lines(found: Data) -> list[str]:
    """The page's sections for whatever was measured."""
    made = []
    for name, section in (
        ("reading", _reading),
        ("writing", _writing),
        ("answering", _answering),
        ("codecs", _codecs),
        ("many", _many),
    ):
        if name in found:
            made += [*section(found[name]), ""]
    return made


def _conditions(part: Data) -> str:
    made = part["conditions"]
    return (
        f"{made['documents']} documents of {made['tokens']} tokens, {made['layers']} layers, "
        f"{made['kv_heads']} key heads of {made['head_dim']}, float32. {made['device']}, {made['cores']} "
        f"cores, Linux {made['kernel']}, {made['file_system']}, load average {made['load']} when it began, "
        f"{made['repeat']} runs, torch {made['torch']}, Python {made['python']}, {made['date']}."
    )


def _rate(part: Data, how: str, name: str) -> float:
    """MB/s."""
    return part["bytes"] / part[how][name] / 1e6


def _floor(part: Data, rate: float, seconds: float) -> str:
    least = part["bytes"] / rate / 1e6
    return f" Floor, all bytes at the rate of `dd`: {least * 1e3:.0f} ms; the store: {seconds * 1e3:.0f} ms."


def _reading(part: Data) -> list[str]:
    made = [
        "### Reading",
        "",
        f"{part['bytes'] / 1e6:.0f} MB. {_conditions(part)}",
        "",
        "| MB/s | page cache dropped | of the better `dd` | least disturbed | in the page cache | of `dd` |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    floor = max(_rate(part, "cold", "dd"), _rate(part, "cold", "dd_direct"))
    made[2] += _floor(part, floor, part["cold"]["store"])
    for title, name in _READING:
        cold, warm = _rate(part, "cold", name), _rate(part, "warm", name)
        made.append(
            f"| {title} | {cold:,.0f} | {cold / floor:.0%} | {_rate(part, 'cold_best', name):,.0f} "
            f"| {warm:,.0f} | {warm / _rate(part, 'warm', 'dd'):.0%} |"
        )
    return made


def _writing(part: Data) -> list[str]:
    made = [
        "### Writing, synced",
        "",
        f"{part['bytes'] / 1e6:.0f} MB. {_conditions(part)}",
        "",
        "| | MB/s | of `dd` | least disturbed |",
        "|---|---:|---:|---:|",
    ]
    floor = _rate(part, "synced", "dd")
    made[2] += _floor(part, floor, part["synced"]["store"])
    for title, name in _WRITING:
        rate = _rate(part, "synced", name)
        made.append(
            f"| {title} | {rate:,.0f} | {rate / floor:.0%} | {_rate(part, 'synced_best', name):,.0f} |"
        )
    return made


def _answering(part: Data) -> list[str]:
    shape, seconds = part["model"], part["seconds"]
    made = [
        "### First token from disk and from memory",
        "",
        f"{shape['documents']} documents of {shape['tokens']} tokens, {shape['bytes'] / 1e6:.0f} MB; a "
        f"question of {shape['question']}; random weights, {shape['layers']} layers, {shape['hidden']} wide, "
        f"float32; threads: {part['conditions']['threads']}.",
        "",
        "| | median | of memory | least disturbed |",
        "|---|---:|---:|---:|",
    ]
    for title, name in _ANSWERING:
        made.append(
            f"| {title} | {seconds[name] * 1e3:,.1f} ms | {seconds[name] / seconds['memory']:.2f}x "
            f"| {part['seconds_best'][name] * 1e3:,.1f} ms |"
        )
    return made


def _codecs(part: Data) -> list[str]:
    made = [
        "### Codecs",
        "",
        "By the measure of `kvrag doctor`: KL divergence of the next token's distribution from that of raw",
        "rows, at the answer's tokens. Random weights attend to everything alike: their losses say little.",
        "",
        "| | bytes per token | of raw | KL, nats | same token |",
        "|---|---:|---:|---:|---:|",
    ]
    for title, name in (("kvrag/reader", "reader"), ("random 0.5B shape", "random")):
        raw = next(score["bytes_per_token"] for score in part[name] if score["name"] == "raw")
        made += [
            f"| {title}, {s['name']} | {s['bytes_per_token']:,.0f} | {s['bytes_per_token'] / raw:.0%} "
            f"| {s['kl']:.1e} | {s['top1']:.1%} |"
            for s in part[name]
        ]
    return made


def _many(part: Data) -> list[str]:
    made = [f"### {part['entries']:,} small entries", "", "| | |", "|---|---:|"]
    return made + [f"| {title} | {_time(part[name])} |" for title, name in _MANY]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.1f} ms"
