"""What the command line prints with: consoles, rows that fit, bars on terminals only, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text
from rich.theme import Theme

if TYPE_CHECKING:  # help texts must not wait for torch
    from kvrag.rag import Reply, Source

_BAR = 10
# To be read on light and on dark terminals: no yellow, no cyan, no blue.
_COLOURS = {"error": "bold red", "warning": "bold magenta", "note": "bold"}
_BARS = Theme({"progress.remaining": "none", "progress.download": "none", "progress.data.speed": "none"})


def stdout() -> Console:
    """Standard output."""
    # What is printed is the user's text: [x] and :x: in it mean themselves.
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def stderr() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False, theme=_BARS)


def loading(model: str) -> AbstractContextManager[Any]:
    """A line on terminals while a model is loaded; one of a hub may have to come over the network first."""
    is_here = model == "kvrag/reader" or Path(model).exists()
    return stderr().status(f"loading {model}" + ("" if is_here else ", from its hub if it is not here yet"))


def tell(kind: Literal["error", "warning", "note"], message: str) -> None:
    """A line on standard error; on a terminal it is broken between words, and the kind has a colour."""
    out = stderr()
    line = Text.assemble((f"{kind}:", _COLOURS[kind]), " ", message)
    out.print(line, soft_wrap=not out.is_terminal)


def count(number: int, what: str) -> str:
    """A number of things.

    >>> count(1, "chunk"), count(2, "chunk")
    ('1 chunk', '2 chunks')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def print_rows(header: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> None:
    """Lines no wider than the terminal: the first column whole, the others cut, the second at its front."""
    out = stdout()
    first = max(cell_len(row[0]) for row in [header, *rows])
    left = max(24, out.width - first - 4)
    second = min(left // 2, max(cell_len(row[1]) for row in [header, *rows]))
    for number, row in enumerate([header, *rows]):
        cells = (_cut(row[0], first), _cut(_cut_front(row[1], second), second), _cut(row[2], left - second))
        out.print("  ".join(cells).rstrip(), style=None if number else "bold")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Lines no wider than the terminal: the first column is cut at its front, the others are whole."""
    out = stdout()
    widths = [max(cell_len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    widths[0] = min(widths[0], max(12, out.width - sum(widths[1:]) - 2 * (len(widths) - 1)))
    for number, row in enumerate([header, *rows]):
        first = _cut(_cut_front(row[0], widths[0]), widths[0])
        others = (f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))
        out.print("  ".join([first, *others]), style=None if number else "bold")


def _cut(text: str, width: int) -> str:
    cell = Text(text)
    cell.truncate(width, overflow="ellipsis", pad=True)
    return cell.plain


def print_reply(reply: Reply) -> None:
    """What an answer rests on and what it cost, in lines no wider than the terminal."""
    out = stdout()
    print_sources(out, reply.sources)
    usage, timing = reply.answer.usage, reply.answer.timing
    out.print(
        f"  first token after {timing.first_token * 1e3:.0f} ms; read {usage.read_tokens} of "
        f"{usage.prompt_tokens} prompt tokens"
    )
    _print_parts(out, _status(reply))


def print_sources(out: Console, sources: Sequence[Source]) -> None:
    """What an answer rests on, in the order given."""
    is_known = any(source.focus for source in sources)  # not where documents were read in full
    for source in sources:
        _print_source(out, source, share=f"{source.focus:4.0%}" if is_known else "   -")


def print_trace(reply: Reply) -> None:
    """Where each document's rows came from and why from there, in the order of the prompt."""
    out, trace = stdout(), reply.answer.trace
    names = {source.id: source.name for source in reply.sources}
    for one in trace.documents:
        ahead = ", asked for ahead" if one.is_prefetched else ""
        what = f"{one.origin}, {size(one.num_bytes)} in {one.seconds * 1e3:.1f} ms{ahead}"
        out.print(
            f"  {_cut_front(names.get(one.key, one.key), max(12, out.width - 4 - cell_len(what)))}: {what}"
        )
        out.print(f"    {one.choice.reason}")
    if trace.full_prefill_seconds is not None:
        out.print(f"  reading the whole prompt would take {trace.full_prefill_seconds * 1e3:.0f} ms")


def _print_source(out: Console, source: Source, share: str) -> None:
    """Share of the answer's attention, as a number and a bar, then what became of the chunk."""
    states = [f"{source.num_tokens} tokens", "cached" if source.is_hit else "read now"]
    if source.dropped_at is not None:
        states.append(f"dropped at layer {source.dropped_at}")
        states += ["taken back"] if source.is_read else []
    elif not source.is_read:
        states.append("left out")
    end = f"  ({', '.join(states)})"
    bar = "#" * round(source.focus * _BAR)
    left = max(12, out.width - 2 - 4 - 1 - _BAR - 2 - cell_len(end))
    out.print(f"  {share} {bar:<{_BAR}}  {_cut_front(source.name, left)}{end}")
    if source.span is not None and source.span.mass:
        place = f"{'':19}tokens {source.span.start} to {source.span.end - 1}: "
        words = " ".join(source.span.text.split())
        out.print((place + _cut(words, max(12, out.width - len(place)))).rstrip())


def _status(reply: Reply) -> list[str]:
    answer, usage = reply.answer, reply.answer.usage
    parts = [answer.policy, f"recomputed {usage.recomputed_tokens} tokens"]
    if usage.read_bytes < usage.cached_bytes:
        parts.append(f"read {size(usage.read_bytes)} of {size(usage.cached_bytes)} cached")
    if answer.risk is not None:
        parts.append(f"risk {answer.risk.value:.2f}")
    if answer.in_full:
        parts.append("read in full")
    return parts


def print_spans(spans: Sequence[tuple[str, str]], show: Callable[[str], None]) -> None:
    """Places in a conversation and what they say, each in a line no wider than the terminal.

    Args:
        spans: what the place is called, and the text.
        show: prints a line.
    """
    width = stdout().width
    for name, text in spans:
        place = f"  {name}: "
        show((place + _cut(" ".join(text.split()), max(12, width - len(place)))).rstrip())


def _print_parts(out: Console, parts: Sequence[str]) -> None:
    """One line, or more if the terminal is narrow; no part is cut."""
    line = f"  {parts[0]}"
    for part in parts[1:]:
        if cell_len(line) + 2 + cell_len(part) > out.width:
            out.print(f"{line};")
            line = f"    {part}"
        else:
            line += f"; {part}"
    out.print(line)


def _cut_front(text: str, width: int) -> str:
    """The end of a text: of a path, that is what tells it from others."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) >= width:
        text = text[1:]
    return f"…{text}"


def print_json(value: Any) -> None:
    """One line on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def progress_bar(title: str) -> AbstractContextManager[Any]:
    """A bar on standard error, on terminals only; gives a function of (done, in all)."""
    return _bar(title, MofNCompleteColumn(), TimeRemainingColumn())


def bytes_bar(title: str) -> AbstractContextManager[Any]:
    """The same for bytes, with their rate."""
    return _bar(title, DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())


def token_bar(title: str) -> AbstractContextManager[Any]:
    """The same for tokens, with their rate."""
    return _bar(title, MofNCompleteColumn(), _Rate(), TimeRemainingColumn())


class _Rate(ProgressColumn):
    """Tokens a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} tokens/s" if task.speed else "")


@contextmanager
def _bar(title: str, *columns: ProgressColumn) -> Iterator[Any]:
    shown = (TextColumn("{task.description}"), BarColumn(bar_width=20), *columns)
    console = stderr()
    with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
