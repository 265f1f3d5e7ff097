"""What the command line prints with: consoles, rows that fit, bars on terminals only, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def stdout() -> Console:
    """Standard output."""
    # What is printed is the user's text: [x] and :x: in it mean themselves.
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def stderr() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def print_rows(header: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> None:
    """Lines no wider than the terminal: the first column whole, the others cut to what is left."""
    out = stdout()
    first = max(cell_len(row[0]) for row in [header, *rows])
    left = max(24, out.width - first - 4)
    second = min(left // 2, max(cell_len(row[1]) for row in [header, *rows]))
    for number, row in enumerate([header, *rows]):
        cells = (_cut(text, width) for text, width in zip(row, (first, second, left - second), strict=True))
        out.print("  ".join(cells).rstrip(), style=None if number else "bold")


def _cut(text: str, width: int) -> str:
    cell = Text(text)
    cell.truncate(width, overflow="ellipsis", pad=True)
    return cell.plain


def print_json(value: Any) -> None:
    """One line on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A bar on standard error, on terminals only; gives a function of (done, in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
