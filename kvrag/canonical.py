"""Texts without what escaping, quoting and wrapping change: for finding chunks that a chain has dressed up.

A prompt is looked at in several *views*, each of which undoes one way of escaping and drops white space and
marks of quotation; known texts lose the same, and nothing is undone in them. What is found in a view is the
known text letter by letter, except for white space and marks of quotation.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_SHORT = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0"}
_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_NUMBER = r"\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\x[0-9a-fA-F]{2}"
_BACKSLASH = re.compile(rf"{_PAIR}|{_NUMBER}|\\[nrtbfav0\"'/\\]")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# White space, and marks of quotation at the beginning of a line with what is between them.
_DROPPED = re.compile(r"\A[>\s]+|\s*[\n\r][>\s]*|\s+")


@dataclass(frozen=True, slots=True)
class View:
    """A text without white space and escapes.

    Attributes:
        text: what is left.
        starts: for each piece that is left in one go, where it begins in `text`; ascending.
        places: the same for the original text: begin, end, and whether letters correspond one to one.
    """

    text: str
    starts: tuple[int, ...]
    places: tuple[tuple[int, int, bool], ...]

    def place(self, start: int, end: int) -> tuple[int, int]:
        """Where `text[start:end]`, not empty, stands in the original text."""
        return self._place(start)[0], self._place(end - 1)[1]

    def _place(self, at: int) -> tuple[int, int]:
        number = bisect_left(self.starts, at + 1) - 1
        begin, end, is_plain = self.places[number]
        if not is_plain:
            return begin, end
        begin += at - self.starts[number]
        return begin, begin + 1


def canonical(text: str) -> str:
    """A known text without white space, and without `>` at the beginnings of its lines.

    >>> canonical("> To be, or not to be")
    'Tobe,ornottobe'
    """
    return _DROPPED.sub("", text) if ">" in text else "".join(text.split())


def views(text: str) -> Iterator[View]:
    """A prompt as it is, with backslashes undone, with entities undone, with both; where there are any."""
    yield _view(text, None, None)
    has_backslashes, has_entities = "\\" in text, "&" in text
    if has_backslashes:
        yield _view(text, _BACKSLASH, _unescaped)
    if has_entities:
        yield _view(text, _ENTITY, html.unescape)
    if has_backslashes and has_entities:
        yield _view(text, re.compile(f"{_BACKSLASH.pattern}|{_ENTITY.pattern}"), _either)


def _either(escape: str) -> str:
    return html.unescape(escape) if escape.startswith("&") else _unescaped(escape)


def _unescaped(escape: str) -> str:
    """The character that JSON or Python writes so; itself if there is none."""
    kind, rest = escape[1], escape[2:]
    if len(escape) == len(r"\ud800\udc00"):
        high, low = int(escape[2:6], 16), int(escape[8:12], 16)
        return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))
    if rest:
        number = int(rest, 16)
        return chr(number) if number <= 0x10FFFF else escape
    return _SHORT.get(kind, kind)


def _view(text: str, escapes: re.Pattern[str] | None, undo: Callable[[str], str] | None) -> View:
    """Undo the escapes, then drop what is to be dropped, and keep in mind where everything came from."""
    runs = list(_runs(text, escapes, undo))  # (what is left, begin, end, is plain)
    whole = "".join(run[0] for run in runs)
    gaps = [match.span() for match in _DROPPED.finditer(whole)]
    kept: list[str] = []
    starts: list[int] = []
    places: list[tuple[int, int, bool]] = []
    length = at = gap = 0
    for piece, begin, end, is_plain in runs:
        for low, high in _without(at, at + len(piece), gaps, gap):
            part = whole[low:high]
            kept.append(part)
            starts.append(length)
            moved = (begin + low - at, begin + high - at) if is_plain else (begin, end)
            places.append((*moved, is_plain))
            length += len(part)
        at += len(piece)
        while gap < len(gaps) and gaps[gap][1] <= at:
            gap += 1
    return View("".join(kept), tuple(starts), tuple(places))


def _runs(
    text: str, escapes: re.Pattern[str] | None, undo: Callable[[str], str] | None
) -> Iterator[tuple[str, int, int, bool]]:
    """Plain runs and undone escapes, in order."""
    at = 0
    if escapes is not None and undo is not None:
        for match in escapes.finditer(text):
            undone = undo(match.group())
            if len(undone) != 1:  # unknown names of entities, and names of several characters
                continue
            if at < match.start():
                yield text[at : match.start()], at, match.start(), True
            yield undone, match.start(), match.end(), False
            at = match.end()
    if at < len(text):
        yield text[at:], at, len(text), True


def _without(start: int, end: int, gaps: list[tuple[int, int]], gap: int) -> Iterator[tuple[int, int]]:
    """What is left of `start`..`end` between the gaps from number `gap` on."""
    while gap < len(gaps) and gaps[gap][0] < end:
        low, high = gaps[gap]
        if start < low:
            yield start, low
        start = max(start, high)
        gap += 1
    if start < end:
        yield start, end
