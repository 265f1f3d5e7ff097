"""Digests of growing texts: whether another text begins the same way, without keeping either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class TextDigest:
    """A text as its length, a chain over its whole blocks, and what is left behind them.

    It is extended without the text before, takes a few kilobytes however long the text is, and two are equal
    exactly if the texts are (up to a collision of 256 bits).

    >>> TextDigest().add("one ").add("two") == TextDigest().add("one two")
    True
    """

    length: int = 0
    chain: bytes = b""
    tail: str = ""

    def add(self, text: str) -> TextDigest:
        """Of this text and more behind it."""
        left, chain = self.tail + text, self.chain
        whole = len(left) - len(left) % _BLOCK
        for start in range(0, whole, _BLOCK):
            block = left[start : start + _BLOCK].encode("utf-8", "surrogatepass")
            chain = blake2b(chain + block, digest_size=32).digest()
        return TextDigest(self.length + len(text), chain, left[whole:])


def longest(known: Sequence[TextDigest], text: str) -> int | None:
    """Number of the longest known text that another one begins with; None: of none.

    Args:
        known: in any order.
        text: the other one.
    """
    found, at, digest = None, 0, TextDigest()
    for number in sorted(range(len(known)), key=lambda n: known[n].length):
        end = known[number].length
        if end > len(text):
            break
        digest, at = digest.add(text[at:end]), end
        if digest == known[number]:
            found = number
    return found
