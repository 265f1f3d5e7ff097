"""kvrag ask: policies and what is shown of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from kvrag.cli import asking
from kvrag.focus.policy import PRESETS

Run = Callable[..., Any]
Refused = Callable[[Any, str], None]
LIGHTHOUSE = "The lighthouse of Varn was built in 1871."
FERRY = "A ferry crosses the [bold]Mirrow[/bold] twice a :smile: day."
NOTE = "note: kvrag/reader is a tiny model"


def test_the_help_names_every_policy() -> None:
    assert set(asking.POLICIES.split(", ")) == set(PRESETS)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_policy_answers(ingested: Run, name: str) -> None:
    done = ingested("ask", "Who?", "--policy", name, "--max-new-tokens", "2", "--spans")
    assert done.status == 0
    assert done.err == ""
    assert f"  {name}; recomputed " in done.out
    assert re.search(r"\brisk [01]\.\d\d$", done.out, flags=re.MULTILINE)
    assert re.search(r"^ {19}tokens \d+ to \d+: ", done.out, flags=re.MULTILINE)
    assert all(cell_len(line) <= 80 for line in done.out.rpartition("\n\n")[2].splitlines())


def test_pruned_documents_are_marked(ingested: Run) -> None:
    options = ("Who?", "--policy", "cachefocus", "--keep", "1", "--max-new-tokens", "2")
    done = ingested("ask", *options)
    sources = done.out.rpartition("\n\n")[2].splitlines()
    assert sources[0].endswith("tokens, cached)")
    assert re.search(r"tokens, cached, dropped at layer [1-3]\)$", sources[1])
    assert re.search(r"; read [\d.]+ KiB of [\d.]+ KiB cached;", done.out)

    found = ingested("ask", *options, "--json").object
    kept, dropped = found["sources"]
    assert (kept["is_read"], kept["dropped_at"]) == (True, None)
    assert not dropped["is_read"]
    assert dropped["focus"] < kept["focus"]
    assert dropped["dropped_at"] in (1, 2, 3)
    assert found["usage"]["read_bytes"] < found["usage"]["cached_bytes"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--keep", "0.5"], "plain+pruning"),
        (["--repair", "0.3"], "plain+query-driven"),
        (["--policy", "cacheblend", "--repair", "0.3"], "cacheblend"),
        (["--policy", "cachefocus", "--repair", "0.3", "--keep", "2"], "cachefocus+query-driven"),
        (["--policy", "ape", "--keep", "1", "--repair", "0.3"], "ape+pruning+query-driven"),
        (["--policy", "cachefocus", "--layers", "1,0", "--rows", "last"], "cachefocus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_policies_are_composed(ingested: Run, options: list[str], name: str) -> None:
    found = ingested("ask", "Who?", *options, "--max-new-tokens", "2", "--json").object
    assert found["policy"] == name
    dropped = [s["dropped_at"] for s in found["sources"] if not s["is_read"]]
    assert len(dropped) == ("0.5" in options or "1" in options or "1,0" in options)
    if "--layers" in options:
        assert dropped[0] >= 2
    if "0.3" in options:
        kept = sum(s["num_tokens"] for s in found["sources"] if s["is_read"])
        assert found["usage"]["recomputed_tokens"] == pytest.approx(0.3 * kept, abs=1)


def test_a_risk_above_the_limit_is_read_in_full(ingested: Run) -> None:
    options = ("ask", "Who?", "--max-new-tokens", "2", "--max-risk")
    done = ingested(*options, "0")
    assert done.out.splitlines()[-1].endswith("; read in full")
    found = ingested(*options, "0", "--json").object
    assert found["in_full"]
    assert found["usage"]["recomputed_tokens"] >= sum(s["num_tokens"] for s in found["sources"]) - 1
    assert "read in full" not in ingested(*options, "1").out


def test_long_names_keep_their_end(run: Run, model: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("folder " * 6) / ("another " * 6)
    deep.mkdir(parents=True)
    (deep / "file.txt").write_text(LIGHTHOUSE)
    assert run("ingest", deep, "--model", model).status == 0
    out = run("ask", "Who?", "--max-new-tokens", "2").out
    assert re.search(r"….*/file\.txt  \(\d+ tokens, cached\)", out)
    assert all(cell_len(line) <= 80 for line in out.rpartition("\n\n")[2].splitlines())


def test_the_trace_says_where_rows_came_from(ingested: Run) -> None:
    done = ingested("ask", "Who?", "--max-new-tokens", "2", "--trace")
    assert done.status == 0
    lines = done.out.rpartition("\n\n")[2].splitlines()
    assert len([line for line in lines if re.search(r": disk, [\d.]+ KiB in [\d.]+ ms", line)]) == 2
    assert sum("speeds are not known yet" in line or "rows are in memory" in line for line in lines) == 2
    found = ingested("ask", "Who?", "--max-new-tokens", "2", "--json").object
    assert [one["origin"] for one in found["trace"]["documents"]] == ["disk", "disk"]
    stats = ingested("stats", "--json").object
    assert stats["loads"] == 4
    assert stats["saved_seconds"] > 0  # encoding was measured while documents were ingested
    assert "loaded 4 times" in ingested("stats").out
