"""kvrag size: what it prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.mark.parametrize("measure", [False, True])
def test_size_fits_a_terminal_and_touches_nothing(run: Run, notes: Path, model: Path, measure: bool) -> None:
    (notes / ("a long name " * 8 + ".txt")).write_text("A mill grinds rye.")
    (notes / "copy.txt").write_text((notes / "a.txt").read_text())
    options = ("size", "notes", "--model", model, *(["--measure"] if measure else []))
    done = run(*options)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()[1:]  # the first one has the model's name
    assert all(len(line) <= 80 for line in lines), lines
    assert lines[0].startswith("4 documents, 3 chunks, 1 duplicates left out, ")
    assert ("(measured)" if measure else "(estimated: see --measure)") in lines[1]
    assert [line.split()[0] for line in lines if line.startswith(("raw", "fp8", "int"))] == [
        "raw",
        "fp8",
        "int8",
        "int4",
    ]
    assert "duplicate" in done.out
    assert not Path(".kvrag").exists()
    found = run(*options, "--json").object
    assert len(found["documents"]) == 4
    assert found["speed"]["is_measured"] is measure


def test_only_the_top_is_shown(run: Run, notes: Path, model: Path) -> None:
    assert "and 1 more; --top shows more" in run("size", "notes", "--model", model, "--top", "1").out
    assert "document " not in run("size", "notes", "--model", model, "--top", "0").out


def test_the_size_is_what_ingesting_takes(run: Run, notes: Path, model: Path) -> None:
    for codec in ("raw", "fp8", "int8", "int4"):
        options = ("notes", "--model", model, "--codec", codec, "--json", "--home", codec)
        (told,) = [c for c in run("size", *options).object["codecs"] if c["codec"] == codec]
        took = run("ingest", *options).object["cache_bytes"]
        assert told["num_bytes"] == pytest.approx(took, rel=0.05)
