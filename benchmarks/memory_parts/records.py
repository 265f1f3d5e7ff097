"""The run folder of `benchmarks/memory.py`: a record for each unit, and their archive."""

from __future__ import annotations

import json
import lzma
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KEY = ("task", "policy", "budget", "room", "batch")


def key_of(record: Record) -> tuple[Any, ...]:
    """Which unit a record is of."""
    return tuple(record[name] for name in KEY)


@dataclass(frozen=True, slots=True)
class Folder:
    """Records of one model in one folder, written by any number of processes."""

    path: Path

    def adopt(self, weights: str, archive: Path | None) -> None:
        """Begin with an archive if the folder is empty, or check that it is of the same model.

        Raises:
            SystemExit: it is of another one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        of = self.path / "weights"
        if not of.exists() and archive is not None and archive.exists():
            first, _, records = lzma.decompress(archive.read_bytes()).decode().partition("\n")
            if json.loads(first)["weights"] == weights:
                (self.path / "records-archive.jsonl").write_text(records)
        if not of.exists():
            of.write_text(weights)
        if of.read_text() != weights:
            sys.exit(f"{self.path} has records of another model; take another --run")

    def records(self) -> list[Record]:
        """One for each unit; a line that was cut by a kill is left out."""
        found: dict[tuple[Any, ...], Record] = {}
        for file in sorted(self.path.glob("records-*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    record: Record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                found.setdefault(key_of(record), record)
        return [found[key] for key in sorted(found)]

    def add(self, part: int, record: Record) -> None:
        """Append in one write; a line that was cut is ended first."""
        text = json.dumps(record, separators=(",", ":")) + "\n"
        with (self.path / f"records-{part}.jsonl").open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else f"\n{text}"
            file.write(text.encode())


def pack(archive: Path, weights: str, records: Sequence[Record]) -> None:
    """Write everything into one compressed file: whose records they are, then one a line."""
    lines = [{"weights": weights}, *records]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(lzma.compress(text.encode(), preset=9))
