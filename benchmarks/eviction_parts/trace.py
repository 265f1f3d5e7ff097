"""A recorded trace of retrievals: which documents each question asked for, and how long they are.

The file is JSON Lines, compressed: a line about its making, a line of the documents' lengths in tokens, a
line of each question's documents by number, nearest first, and one of question numbers per order. No text.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACE = Path(__file__).parents[2] / "docs" / "data" / "trace.jsonl.xz"


@dataclass(frozen=True, slots=True)
class Trace:
    """What was retrieved.

    Attributes:
        made: how: data, embedding, tokenizer, seed.
        sizes: tokens of every document.
        found: for each question the documents that a search returns.
        orders: name of an order -> questions as they were asked.
    """

    made: dict[str, Any]
    sizes: list[int]
    found: list[list[int]]
    orders: dict[str, list[int]]

    def requests(self, order: str) -> list[int]:
        """Documents one after another, as a store is asked for them."""
        return [document for question in self.orders[order] for document in self.found[question]]

    def save(self, path: Path) -> None:
        """Write the file."""
        lines = [self.made, {"sizes": self.sizes}, {"found": self.found}]
        lines += [{"order": name, "questions": asked} for name, asked in self.orders.items()]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        path.write_bytes(lzma.compress(text.encode(), preset=9))


def load(path: Path = TRACE) -> Trace:
    """Read the file."""
    made, sizes, found, *orders = map(json.loads, lzma.decompress(path.read_bytes()).splitlines())
    return Trace(made, sizes["sizes"], found["found"], {line["order"]: line["questions"] for line in orders})
