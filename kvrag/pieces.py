"""Pieces of known texts in a prompt: cut off, split again, or standing half behind one that overlaps them.

A text is noted in blocks of `width` characters. Its beginning is noted as a way through a tree whose edges
are blocks, so that the text with the longest beginning is found in as many look-ups as that has blocks,
however many texts begin alike. If pieces from the middle are wanted, each block is noted with its places; any
piece of twice the width then holds a whole block (as in rsync: Tridgell and Mackerras 1996, "The rsync
algorithm"). Of a block's places only the oldest few are looked at: the time stays linear in the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

_PLACES = 8
_Place = tuple[str, int]  # key and character


@dataclass(frozen=True, slots=True)
class Piece:
    """`prompt[start:end]` is the text of `key` from its character `offset` on."""

    start: int
    end: int
    key: str
    offset: int


@dataclass(slots=True)
class _Node:
    """A beginning that some texts share, and those texts, oldest first.

    Where texts share it, each that goes on has a next step; the way of a single one need not be laid further.
    """

    keys: dict[str, None] = field(default_factory=dict)
    next: dict[str, _Node] = field(default_factory=dict)


class PieceIndex:
    """Texts by the pieces that they are made of; not to be changed while it is searched.

    Args:
        middles: note pieces that are not a text's beginning, too.
        width: characters of a block; the shortest beginning that is found, and half of the shortest piece
            from the middle that is surely found.

    >>> index = PieceIndex(width=4)
    >>> index.add("a", "the cat sat on the mat")
    >>> index.find("See: the cat sat down.", 0, 22)
    [Piece(start=5, end=17, key='a', offset=0)]
    """

    def __init__(self, *, middles: bool = False, width: int = 32) -> None:
        self.middles, self.width = middles, width
        self.compared = 0  # characters that were compared so far, give or take what other threads did
        self._texts: dict[str, str] = {}
        self._root = _Node()
        self._places: dict[str, _Place | dict[_Place, None]] = {}

    def add(self, key: str, text: str) -> None:
        """Note a text under a key that is new."""
        self._texts[key] = text
        if self.middles:
            for at in range(self.width, len(text) - self.width + 1, self.width):
                self._note(text[at : at + self.width], (key, at))
        node = self._root
        for at, block in self._blocks(text):
            child = node.next.get(block)
            if child is None:
                node.next[block] = _Node({key: None})
                break
            if len(child.keys) == 1:
                self._push_down(child, at + self.width)
            child.keys[key] = None
            node = child

    def remove(self, key: str) -> None:
        """Forget a text that is known."""
        text = self._texts.pop(key)
        if self.middles:
            for at in range(self.width, len(text) - self.width + 1, self.width):
                self._forget(text[at : at + self.width], (key, at))
        node = self._root
        for _, block in self._blocks(text):
            child = node.next.get(block)
            if child is None:
                break
            del child.keys[key]
            if not child.keys:  # nobody else goes here: the rest of the way goes with it
                del node.next[block]
                break
            node = child

    def _push_down(self, node: _Node, at: int) -> None:
        """The only text of a node gets its next step, before another one comes."""
        (key,) = node.keys
        block = self._texts[key][at : at + self.width]
        if len(block) == self.width and block not in node.next:
            node.next[block] = _Node({key: None})

    def _note(self, block: str, place: _Place) -> None:
        there = self._places.get(block)
        if there is None:
            self._places[block] = place  # most blocks have one place: no dictionary for these
        elif isinstance(there, dict):
            there[place] = None
        else:
            self._places[block] = {there: None, place: None}

    def _forget(self, block: str, place: _Place) -> None:
        there = self._places[block]
        if isinstance(there, dict):
            del there[place]
        if not isinstance(there, dict) or not there:
            del self._places[block]

    def find(self, prompt: str, start: int, end: int) -> list[Piece]:
        """Pieces in `prompt[start:end]`, from left to right, the longest that is seen at a place first."""
        pieces, at = [], start
        while at <= end - self.width:
            block = prompt[at : at + self.width]
            found = max(self._candidates(prompt, block, at, start, end), key=_length, default=None)
            if found is None:
                at += 1
            else:
                pieces.append(found)
                at = start = found.end
        return pieces

    def _candidates(self, prompt: str, block: str, at: int, floor: int, end: int) -> Iterator[Piece]:
        """Pieces that hold the block at `at`; a beginning comes first."""
        node = self._root.next.get(block)
        if node is not None:
            key, length = self._head(prompt, node, at, end)
            yield Piece(at, at + length, key, 0)
        there = self._places.get(block, {})
        for key, place in islice(there, _PLACES) if isinstance(there, dict) else (there,):
            text = self._texts[key]
            left = self._back(prompt, at, text, place, min(at - floor, place, 2 * self.width))
            right = self._along(prompt, at, text, place, end)
            yield Piece(at - left, at + right, key, place - left)

    def _head(self, prompt: str, node: _Node, at: int, end: int) -> tuple[str, int]:
        """The oldest text whose beginning goes along with the prompt longest, in blocks, and how far."""
        place = at + self.width
        while place + self.width <= end:
            child = node.next.get(prompt[place : place + self.width])
            if child is None:
                break
            node = child
            place += self.width
        key = next(iter(node.keys))
        return key, self._along(prompt, at, self._texts[key], 0, end)

    def _along(self, prompt: str, at: int, text: str, place: int, end: int) -> int:
        """How many characters are the same from here on."""
        limit = min(end - at, len(text) - place)
        length, step = 0, self.width
        while length < limit:
            step = min(step, limit - length)
            self.compared += step
            if prompt[at + length : at + length + step] == text[place + length : place + length + step]:
                length += step
                step *= 2
            elif step == 1:
                break
            else:
                limit = length + step - 1  # it differs within this step
                step = max(1, step // 2)
        return length

    def _back(self, prompt: str, at: int, text: str, place: int, limit: int) -> int:
        """How many characters are the same before here."""
        length = 0
        while length < limit and prompt[at - length - 1] == text[place - length - 1]:
            length += 1
        self.compared += length + 1
        return length

    def _blocks(self, text: str) -> Iterator[tuple[int, str]]:
        for at in range(0, len(text) - self.width + 1, self.width):
            yield at, text[at : at + self.width]


def _length(piece: Piece) -> int:
    return piece.end - piece.start
