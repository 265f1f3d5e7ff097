"""Files into documents, documents into chunks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from kvrag.errors import ConfigError, InputError, MissingExtra

Tokenize = Callable[[str], Sequence[int]]
_BORDERS = (
    re.compile(r"\n[ \t]*\n\s*"),  # paragraphs
    re.compile(r"(?<=[.!?。！？])[\"')\]»”]*\s+|(?<=[。！？])|\n"),  # sentences and lines
    re.compile(r"\s+"),  # words
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it comes from.

    Attributes:
        text: as it stands in the file.
        source: the file's path, with `#page=N` or `#line=N` behind it where a file holds several texts.
        metadata: what else the file says about the text.
    """

    text: str
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load(paths: Iterable[str | Path]) -> Iterator[Document]:
    """Read documents from files and, recursively, folders; sorted, hidden names left out.

    Text and Markdown files are one document each, PDF files one per page with text, JSON Lines files one
    per line ({"text": ..., anything else is metadata}). In folders, files of other types are passed over.

    Raises:
        InputError: no such path, a type that cannot be read, or content that is broken; with file and line.
        MissingExtra: a PDF file, and pypdf is not installed.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if path.is_dir():
            for file in _files(path):
                yield from _READERS[file.suffix.lower()](file)
        elif path.suffix.lower() in _READERS:
            yield from _READERS[path.suffix.lower()](path)
        else:
            raise InputError(f"{path}: cannot read this type of file; expected {', '.join(sorted(_READERS))}")


def passed_over(paths: Iterable[str | Path]) -> list[Path]:
    """Files in folders that `load` leaves out because of their type; hidden ones are not counted."""
    folders = [path for path in map(Path, paths) if path.is_dir()]
    return [file for folder in folders for file in _all_files(folder) if file.suffix.lower() not in _READERS]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in _all_files(folder) if path.suffix.lower() in _READERS)


def _all_files(folder: Path) -> Iterator[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _all_files(path)
        else:
            yield path


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in raw:
            raise InputError(f"{path}: this is no text, whatever its name says; leave it out") from error
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start}; convert it, e.g. iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _load_text(path: Path) -> Iterator[Document]:
    yield Document(_read_text(path), str(path))


def _load_jsonl(path: Path) -> Iterator[Document]:
    # Not splitlines: it also cuts at characters that JSON allows inside a string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise InputError(f'{path}, line {number}: expected an object with "text": "..."')
        text = fields.pop("text")
        yield Document(text, f"{path}#line={number}", fields)


def _load_pdf(path: Path) -> Iterator[Document]:
    try:
        import pypdf  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise MissingExtra("pypdf", "pdf") from error
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(path).pages]
    except Exception as error:  # pypdf raises many kinds on broken files
        raise InputError(f"{path}: cannot be read as PDF: {error}") from error
    for number, text in enumerate(pages, start=1):
        if text.strip():
            yield Document(text, f"{path}#page={number}", {"page": number})


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": _load_text,
    ".md": _load_text,
    ".markdown": _load_text,
    ".jsonl": _load_jsonl,
    ".pdf": _load_pdf,
}


def split(
    text: str,
    tokenize: Tokenize,
    max_tokens: int,
    *,
    target: int | None = None,
    by: Literal["size", "paragraph"] = "size",
) -> list[str]:
    """Cut a text into chunks at paragraphs, else at sentences, else at words, else anywhere.

    Chunks are verbatim, stripped pieces of the text, in order, and together hold every word of it.

    Args:
        text: any text; a blank one gives no chunk.
        tokenize: counts a chunk's tokens.
        max_tokens: no chunk has more.
        target: neighbours are joined up to so many tokens; `max_tokens` if None.
        by: "size" joins neighbours; "paragraph" makes every paragraph a chunk of its own (a paragraph
            beyond `max_tokens` is still cut).

    Raises:
        ConfigError: no chunk can be that small.
    """
    target = max_tokens if target is None else min(target, max_tokens)
    if target < 1:
        raise ConfigError(f"chunks of {target} tokens: expected at least 1")
    if by not in ("size", "paragraph"):
        raise ConfigError(f"by={by!r}: expected 'size' or 'paragraph'")
    cutter = _Cutter(text, tokenize, target)
    if by == "size":
        spans = cutter.cut((0, len(text)), 0)
    else:
        spans = [
            s for piece in cutter.pieces((0, len(text)), 0) for s in cutter.cut(piece, 1, limit=max_tokens)
        ]
    return [text[start:end] for start, end in spans]


Span = tuple[int, int]


class _Cutter:
    """Cuts one text; spans are half-open character ranges of it, stripped."""

    def __init__(self, text: str, tokenize: Tokenize, target: int) -> None:
        self._text = text
        self._tokenize = tokenize
        self._target = target

    def cut(self, span: Span, level: int, *, limit: int | None = None) -> list[Span]:
        """Spans that fit, packed greedily; pieces that do not fit are cut at the next finer border."""
        limit = self._target if limit is None else limit
        span = self._strip(span)
        if span[0] == span[1]:
            return []
        if self._fits(span, limit):
            return [span]
        if level == len(_BORDERS):
            return self._cut_anywhere(span, limit)
        packed: list[Span] = []
        for piece in self.pieces(span, level):
            if packed and self._fits((packed[-1][0], piece[1]), limit):
                packed[-1] = (packed[-1][0], piece[1])
            else:
                packed += self.cut(piece, level + 1, limit=limit)
        return packed

    def pieces(self, span: Span, level: int) -> list[Span]:
        """The span's parts between borders of a level, without blank ones."""
        cuts = [span[0]]
        cuts += [border.end() for border in _BORDERS[level].finditer(self._text, *span)]
        cuts.append(span[1])
        parts = (self._strip(part) for part in pairwise(cuts))
        return [part for part in parts if part[0] < part[1]]

    def _fits(self, span: Span, limit: int) -> bool:
        return len(self._tokenize(self._text[span[0] : span[1]])) <= limit

    def _strip(self, span: Span) -> Span:
        start, end = span
        while start < end and self._text[start].isspace():
            start += 1
        while end > start and self._text[end - 1].isspace():
            end -= 1
        return start, end

    def _cut_anywhere(self, span: Span, limit: int) -> list[Span]:
        """A word longer than a chunk, cut into the longest pieces that fit."""
        start, end = span
        spans = []
        while start < end:
            size = self._longest(start, end, limit)
            spans.append((start, start + size))
            start += size
        return spans

    def _longest(self, start: int, end: int, limit: int) -> int:
        """How many characters from `start` fit: doubled until they do not, then halved in between."""
        fits, too_many = 0, 1
        while too_many <= end - start and self._fits((start, start + too_many), limit):
            fits, too_many = too_many, 2 * too_many
        too_many = min(too_many, end - start + 1)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self._fits((start, start + middle), limit):
                fits = middle
            else:
                too_many = middle
        if fits == 0:
            raise ConfigError(f"chunks of {limit} tokens: the character {self._text[start]!r} alone has more")
        return fits
