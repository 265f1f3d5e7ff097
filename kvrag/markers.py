"""Marks in a prompt's text that name a known text: `[[kv:KEY]]` right in front of it.

A mark is a hint and never a proof. It counts only if the text behind it is, letter by letter, the known text
of its key; a forged one is text like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from kvrag.errors import InputError

_MARK = re.compile(r"\[\[kv:([^\[\]\s]{1,256})\]\]")

# A mark whose text begins right and goes on wrong costs a comparison of the whole text. A prompt may have so
# many of them that this many times its length is compared; marks behind those are text like any other.
_COMPARED = 8
_GLANCE = 64


def mark(key: str) -> str:
    """The mark to put in front of a text.

    Raises:
        InputError: a key with brackets or white space, an empty one, or more than 256 characters.

    >>> mark("doc-1")
    '[[kv:doc-1]]'
    """
    made = f"[[kv:{key}]]"
    if not _MARK.fullmatch(made):
        raise InputError(
            f"{key[:60]!r} cannot stand in a mark: 1 to 256 characters, no brackets, no white space"
        )
    return made


def marked(
    prompt: str, start: int, text_of: Callable[[str], str | None]
) -> Iterator[tuple[int, int, int, str]]:
    """Marks that tell the truth: where each begins, where its text begins and ends, and its key.

    Args:
        prompt: the text.
        start: where to begin.
        text_of: the known text of a key; None for unknown keys.
    """
    left = _COMPARED * len(prompt)
    for match in _MARK.finditer(prompt, start):
        begin, key = match.end(), match[1]
        text = text_of(key) if match.start() >= start else None
        for form in (text, text.strip()) if text else ():
            if not form or not prompt.startswith(form[:_GLANCE], begin):
                continue
            left -= len(form)
            if left >= 0 and prompt.startswith(form, begin):
                start = begin + len(form)  # a mark inside another mark's text is part of that text
                yield match.start(), begin, start, key
                break
