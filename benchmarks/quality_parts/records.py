"""The run folder of `benchmarks/quality.py`: raw records of all seeds, and their archive."""

from __future__ import annotations

import json
import lzma
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_parts.summary import Record

SAME = ("weights", "window", "score_layers")

# A question: seed, turn, number of documents, kind.
Key = tuple[int, int, int, str]


@dataclass(frozen=True, slots=True)
class Folder:
    """A run's folder: what it measures, and the records of all seeds."""

    path: Path

    @property
    def run(self) -> Path:
        """The file that says what is measured."""
        return self.path / "run.json"

    def adopt(self, made: dict[str, Any]) -> dict[str, Any]:
        """Keep what a run measures, or check that the folder's runs measured the same.

        Raises:
            SystemExit: the folder has records of other weights or settings.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.run.exists():
            partial = self.run.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(made, indent=1) + "\n")
            partial.replace(self.run)
        kept: dict[str, Any] = json.loads(self.run.read_text())
        for name in SAME:
            if kept[name] != made[name]:
                sys.exit(
                    f"{self.path} has records of {name} {kept[name]}, not {made[name]}; take another --run"
                )
        return kept

    def records(self) -> list[Record]:
        """One record for each question, with the answers of all policies, asked in one run or in several.

        A line that was cut by a kill is left out.
        """
        found: dict[Key, Record] = {}
        for file in sorted(self.path.glob("records-*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    record: Record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                first = found.setdefault(key_of(record), record)
                if first is not record:
                    first["answers"] = _joined(first["answers"], record["answers"])
                    first |= {name: value for name, value in record.items() if name not in first}
        return list(found.values())

    def add(self, seed: int, records: Sequence[Record]) -> None:
        """Append in one write; a line that was cut is ended first."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        with (self.path / f"records-{seed}.jsonl").open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else f"\n{text}"
            file.write(text.encode())

    def pack(self, archive: Path) -> None:
        """Write everything into one compressed file: what is measured, then a record a line."""
        lines = [json.loads(self.run.read_text()), *self.records()]
        archive.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        archive.write_bytes(lzma.compress(text.encode(), preset=9))

    def unpack(self, archive: Path, made: dict[str, Any]) -> bool:
        """Begin an empty folder with an archive, if that measured the same."""
        if self.run.exists() or not archive.exists():
            return False
        first, _, records = lzma.decompress(archive.read_bytes()).decode().partition("\n")
        kept = json.loads(first)
        if any(kept[name] != made[name] for name in SAME):
            return False
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "records-archive.jsonl").write_text(records)
        self.adopt(kept)
        return True


def _joined(first: dict[str, list[Any]], others: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Answers of both; of two to the same, the first that was on the clock."""
    timed = {name: answer for name, answer in others.items() if answer[2] is not None}
    return others | first | {n: answer for n, answer in timed.items() if n in first and first[n][2] is None}


def key_of(record: Record) -> Key:
    """Which question a record is about."""
    return record["seed"], record["turn"], record["documents"], record["kind"]
