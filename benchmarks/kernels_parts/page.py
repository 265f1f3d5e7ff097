"""Writes docs/kernels.md: the text of kernels.md beside this file, and what docs/data says in its tables.

A line `<!-- cpu: PART -->` of the text stands for a part's table: on a CPU ratios and fractions only, since
other work runs beside the measurements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], object]]

TEXT = Path(__file__).parent / "kernels.md"
COMMAND = "python benchmarks/on_gpu.py --json docs/data/kernels-gpu.json"
NOT_MEASURED = f"""**Not measured.** No GPU was at hand where this was written: the kernels are checked in
Triton's interpreter, and compiled for compute capabilities 8.0 and 9.0, by Triton 3.9.0, 3.6.0 and 3.4.0
(`make test-triton`), which says nothing about speed. One command builds, checks and measures everything on a
machine that has one, what is most worth knowing first:

```
{COMMAND}
```

With `--total 540` nothing begins after nine minutes, and what is known by then is in the file; `python
benchmarks/report.py` puts it on this page."""


def _same(*names: str) -> list[Column]:
    return [(name, lambda row, name=name: row.get(name)) for name in names]  # type: ignore[misc]


def _share(part: str, whole: str) -> Callable[[Row], object]:
    return lambda row: row[part] / row[whole] if row.get(part) is not None else None


def _floor(name: str) -> Callable[[Row], object]:
    """Of the floor, for a time in milliseconds."""
    return lambda row: row["floor ms"] / row[name] if row.get(name) else None


COLUMNS: dict[str, list[Column]] = {
    "segment": [
        *_same("shape", "queries", "rows", "segments", "of the limit"),
        *_same("SDPA, one run / ours", "rotate, copy, SDPA / ours"),
    ],
    "strided": [
        *_same("tokens", "slots", "stride", "times faster", "allowed", "share of allowed"),
        *_same("allowed with scores", "share with scores", "full, of matrix rate"),
        *_same("steady stride, of matrix rate"),
        ("attention and scores", _share("attention and scores s", "strided s")),
        ("tournament", _share("tournament s", "strided s")),
        ("moves", _share("moves s", "strided s")),
    ],
    "cascade update": _same(
        "layers", "key heads", "slots", "stride", "faster than one by one", "faster than serial"
    ),
    "moving rows": _same("what", "layers", "rows per head", "of copy rate", "times faster"),
    "forms": [
        *_same("form", "rows", "quantise of the limit", "unpack of the limit"),
        *_same("attention of the limit", "plain rows / packed"),
    ],
    "linear": _same("in", "out", "rows", "of the limit", "PyTorch's, of the limit", "times faster"),
    "compiled": [
        *_same("device", "what", "kernel", "tile", "warps", "stages", "registers", "spilled bytes"),
        *_same("shared KiB", "planned at once", "programs at once", "KiB under way"),
    ],
    "decode": [
        *_same("model", "documents", "tokens"),
        ("over segments, of the floor", _floor("over segments ms")),
        ("over one run, of the floor", _floor("over one run ms")),
        ("the model's products alone, of the floor", _floor("products alone ms")),
    ],
    "generate": [
        *_same("model", "requests", "documents", "tokens"),
        ("kvrag, of the floor", _floor("kvrag ms")),
        ("`generate`, of the floor", _floor("generate ms")),
        ("compiled, of the floor", _floor("generate, compiled ms")),
        ("the better `generate` / kvrag", lambda row: row["generate / kvrag"]),
        *_same("copy, in steps"),
    ],
}
_BATCH = (
    "python benchmarks/batch.py --models shape --shape 0.1B --documents 8 --document-tokens 512 "
    "--json docs/data/batch.json"
)
_WAYS = (
    ("kvrag, a pass per request", "turns"),
    ("`generate`, one by one", "one_by_one"),
    ("`generate`, batched", "batched"),
)


def page(cpu: Row, gpu: Row | None, batch: Row | None) -> str:
    """The page.

    Args:
        cpu: of docs/data/kernels-cpu.json.
        gpu: of docs/data/kernels-gpu.json; None: not measured.
        batch: of docs/data/batch.json; None: not measured.
    """
    fills: dict[str, Callable[[str], str]] = {
        "conditions": lambda _: _conditions(cpu),
        "cpu": lambda part: _of_cpu(part, cpu),
        "gpu": lambda part: _of_gpu(part, gpu) if part else _on_a_gpu(gpu),
        "callers": lambda _: _callers(batch) if batch else f"Not measured yet: `{_BATCH}`.",
    }
    return re.sub(
        r"^<!-- (\w+)(?:: ([\w ]+))? -->$",
        lambda found: fills[found[1]](found[2] or ""),
        TEXT.read_text(),
        flags=re.MULTILINE,
    )


def _of_cpu(part: str, cpu: Row) -> str:
    if part in cpu:
        return "\n".join(table(COLUMNS[part], cpu[part]["rows"]))
    name = f'"{part}"' if " " in part else part
    command = f"python benchmarks/kernels.py --only {name} --json docs/data/kernels-cpu.json"
    return f"Not measured on a CPU yet: `{command}`."


def _on_a_gpu(gpu: Row | None) -> str:
    if gpu is None:
        return NOT_MEASURED
    made = gpu["versions"]
    failed = [name for name, step in gpu["steps"].items() if step["exit"] != 0]
    return (
        f"{made.get('device')}, torch {made.get('torch')}, triton {made.get('triton')}, transformers "
        f"{made.get('transformers')}, {gpu['date']}; made by `{COMMAND}`."
        + (f" These steps did not end well: {', '.join(failed)}." if failed else "")
    )


def _of_gpu(part: str, gpu: Row | None) -> str:
    measured = (gpu or {}).get("measured", {}).get("kernels", {})
    if part not in measured or not measured[part]["rows"]:
        return "On a GPU: not measured."
    rows = measured[part]["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return "\n".join([f"On {measured[part]['conditions']['device']}:", "", *table(_same(*columns), rows)])


def _conditions(cpu: Row) -> str:
    made = [part["conditions"] for part in cpu.values()]
    first, loads, dates = made[0], [c["load"] for c in made], sorted({c["date"] for c in made})
    return (
        f"{first['device']}, {first['threads']} thread, torch {first['torch']}, Python {first['python']}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; load average {min(loads):.1f} to "
        f"{max(loads):.1f} from other work on two cores, so only ratios and fractions are shown, of the "
        "process's own time. Medians; sides take turns. Made by `python benchmarks/kernels.py --json "
        "docs/data/kernels-cpu.json`."
    )


def _callers(batch: Row) -> str:
    made, rows = batch["conditions"], batch["shape"]
    load, shape = made["load"], made["shape"]
    text = (
        f"{load['documents']} documents of about {load['document_tokens']} tokens each (prompts of "
        f"{rows[0]['prompt_tokens']:,.0f} tokens), answers of {load['new_tokens']}; callers draw from a pool "
        f"of {load['pool']} documents, which were read before. Random weights, {shape['layers']} layers, "
        f"{shape['hidden']} wide, {shape['heads']} heads over {shape['kv_heads']}, {made['dtype']}. "
        f"{made['device']}, {made['threads']} thread, torch {made['torch']}, transformers "
        f"{made['transformers']}, Python {made['python']}, {made['date']}; medians of {made['repeat']} runs, "
        f"of transformers {made['full_repeat']}. Made by `python benchmarks/batch.py`."
    )
    columns: list[Column] = [("callers", lambda row: int(row["callers"]))]
    for title, way in _WAYS:
        columns += [
            (f"tokens/s: kvrag / {title}", lambda row, way=way: row.get(f"ratio_tokens_{way}")),  # type: ignore[misc]
            (f"first token: {title} / kvrag", lambda row, way=way: row.get(f"ratio_first_token_{way}")),  # type: ignore[misc]
        ]
    return "\n".join([text, "", *table(columns, rows)])


def table(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """A Markdown table; columns in which nothing is known are left out."""
    known = [(title, show) for title, show in columns if any(show(row) is not None for row in rows)]
    return [
        "| " + " | ".join(title for title, _ in known) + " |",
        "|" + "".join("---|" if _is_text(show, rows) else "---:|" for _, show in known),
        *("| " + " | ".join(_cell(show(row)) for _, show in known) + " |" for row in rows),
    ]


def _is_text(show: Callable[[Row], object], rows: Sequence[Row]) -> bool:
    return any(isinstance(show(row), str) for row in rows)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
