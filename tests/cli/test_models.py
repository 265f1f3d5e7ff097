"""The shipped reader, the demo and the doctor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvrag.reader
from kvrag import doctor
from kvrag.engine import Engine
from kvrag.home import Home
from kvrag.model import READER

Run = Callable[..., Any]
Refused = Callable[[Any, str], None]
LIGHTHOUSE = "The lighthouse of Varn was built in 1871."
FERRY = "A ferry crosses the [bold]Mirrow[/bold] twice a :smile: day."
NOTE = "note: kvrag/reader is a tiny model"


def test_the_note_about_the_reader_comes_once(
    run: Run, notes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvrag.reader, "path", lambda: model)
    first = run("ingest", "notes")
    assert first.err.count(NOTE) == 1
    assert "--model Qwen/" in first.err
    assert NOTE not in first.out
    assert run("stats", "--json").object["model"] == READER
    for again in (run("ingest", "notes"), run("ask", "Who?", "--max-new-tokens", "2")):
        assert again.status == 0
        assert NOTE not in again.err + again.out
    assert NOTE not in run("ingest", "notes", "--model", model).err


def test_the_demo_needs_no_note(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvrag.reader, "path", lambda: model)
    done = run("demo", "--documents", "4", "--questions", "2", "-k", "2")
    assert done.status == 0
    assert NOTE not in done.err + done.out
    assert done.err == ""
    assert "time to first token, median" in done.out
    assert "same answer both ways" in done.out
    assert "\x1b" not in done.out
    assert all(len(line) <= 80 for line in done.out.partition("question  ")[2].splitlines())
    assert not Path(".kvrag").exists()


def test_the_demo_as_json(run: Run, model: Path, tmp_path: Path) -> None:
    options = (
        "--documents",
        "4",
        "--questions",
        "2",
        "-k",
        "2",
        "--home",
        tmp_path / "kept",
        "--model",
        model,
    )
    found = run("demo", *options, "--json").object
    assert len(found["rows"]) == 2
    assert found["ttft_ratio"] > 0
    assert 0 <= found["agree"] <= 1
    assert all(row["read_tokens"] < row["prompt_tokens"] for row in found["rows"])
    assert Home(tmp_path / "kept").exists()


def test_the_doctor_is_content_with_a_good_model(run: Run, model: Path) -> None:
    done = run("doctor", model, "--questions", "1")
    assert done.status == 0
    assert "exact to rounding" in done.out
    assert "against full attention (1 question over 8 documents, 9 tokens each)" in done.out
    assert "recommended: " in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines()[1:])  # the first one has the model's name
    assert "speeds, measured on this machine" in done.out
    assert "a document is loaded faster than it is read anew" in done.out
    assert sorted(path.name for path in Path().iterdir()) == []  # the disk was measured, and nothing left


def test_the_doctor_keeps_speeds_beside_the_caches(run: Run, notes: Path, model: Path) -> None:
    assert run("ingest", notes, "--model", model).status == 0
    found = run("doctor", model, "--questions", "1", "--json").object["speeds"]
    kept = next(iter(json.loads(Path(".kvrag/store/costs.json").read_text()).values()))
    assert kept["tiers"]["disk"][0] == found["tiers"]["disk"]["bytes_per_second"] > 0
    assert [*found["prefill"]["short"], *found["prefill"]["long"]] == kept["prefill"]
    assert {even["codec"] for even in found["break_even"]} >= {"raw", "int8"}
    for even in found["break_even"]:
        assert even["tokens"] is None or even["tokens"] >= 1


def test_the_doctor_refuses_a_bad_model(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examine = doctor.examine

    def of_a_bad_one(engine: Engine, **options: Any) -> doctor.Report:
        bad = engine.model.specs[0]
        engine.model.specs = type(engine.model.specs)([type(bad)(), *engine.model.specs[1:]])
        return examine(engine, **options)

    monkeypatch.setattr(doctor, "examine", of_a_bad_one)
    done = run("doctor", model)
    assert done.status == 1
    assert "NOT exact: do not use this model" in done.out
    found = run("doctor", model, "--json")
    assert found.status == 1
    assert found.object["full_error"] > found.object["tolerance"]
