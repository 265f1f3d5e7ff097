"""Documents in and out: a day in the life of a collection."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from kvrag.home import Home

Run = Callable[..., Any]
Refused = Callable[[Any, str], None]
LIGHTHOUSE = "The lighthouse of Varn was built in 1871."
FERRY = "A ferry crosses the [bold]Mirrow[/bold] twice a :smile: day."
NOTE = "note: kvrag/reader is a tiny model"


def test_a_day_in_the_life(run: Run, notes: Path, model: Path) -> None:
    done = run("ingest", "notes", "--model", model)
    assert done.status == 0
    assert done.out.startswith("2 documents, 2 chunks: 2 added, 0 unchanged; ")
    assert done.out.rstrip().endswith("caches in .kvrag")
    assert done.err == ""

    done = run("ask", "Who built the lighthouse?", "--max-new-tokens", "6", "--plan")
    assert done.status == 0
    assert "notes/a.txt  (" in done.out
    assert "tokens, cached)" in done.out
    assert re.search(r"first token after \d+ ms; read \d+ of \d+ prompt tokens", done.out)
    assert "kind       characters  tokens  text" in done.out
    assert ":smile: day" in done.out

    done = run("ls")
    lines = done.out.splitlines()
    assert lines[0].split() == ["id", "source", "text"]
    assert [line.split()[1] for line in lines[1:3]] == ["notes/a.txt", "notes/b.md"]
    assert all(len(line) <= 80 for line in lines)
    assert "[bold]" in lines[2]
    assert lines[-1] == "2 chunks"

    done = run("stats")
    assert re.match(r"2 chunks, 2 caches, [\d.]+ KiB\nmodel .*tiny, folder \.kvrag\n", done.out)

    done = run("reconcile")
    assert done.out == "2 chunks: nothing to mend\n"

    for command in (("ask", "Who?"), ("ls",), ("stats",), ("rm", "notes/a.txt"), ("pin", "notes/a.txt")):
        done = run(*command, "--collection", "other")
        assert done.status == 2
        assert "there is no collection 'other' in .kvrag; run: kvrag ingest PATH" in done.err

    assert "removed 1 chunk " in run("rm", "notes/a.txt").out
    assert run("stats", "--json").object["chunks"] == 1
    (left,) = run("ls", "--json").object
    assert run("rm", left["id"]).status == 0
    assert list((Path(".kvrag") / "store").rglob("*.safetensors")) == []


def test_what_is_passed_over_is_said(run: Run, notes: Path, model: Path) -> None:
    for name in ("photo.png", "other.png", "letter.docx", ".hidden"):
        (notes / name).write_bytes(b"\0")
    done = run("ingest", "notes", "--model", model)
    assert done.status == 0
    assert done.err == "note: 3 files (.docx, .png) were passed over; kvrag reads .txt .md .pdf .jsonl\n"
    found = run("ingest", "notes/a.txt", "notes", "--json").object["passed_over"]
    assert sorted(found) == ["notes/letter.docx", "notes/other.png", "notes/photo.png"]


def test_json_is_one_object_and_nothing_else(run: Run, notes: Path, model: Path) -> None:
    found = run("ingest", "notes", "--model", model, "--json").object
    assert (found["documents"], found["chunks"], found["added"], found["unchanged"]) == (2, 2, 2, 0)
    assert found["cache_bytes"] > 1000
    assert found["model"] == str(model)

    found = run("ask", "Who?", "--json", "--max-new-tokens", "3", "-k", "1").object
    assert set(found) == {
        "question",
        "answer",
        "finish_reason",
        "sources",
        "policy",
        "risk",
        "in_full",
        "trace",
        "usage",
        "seconds",
    }
    assert (found["policy"], found["in_full"]) == ("plain", False)
    assert set(found["risk"]) == {"value", "entropy", "others", "doubt"}
    assert found["usage"]["read_bytes"] == found["usage"]["cached_bytes"] > 0
    assert found["usage"]["new_tokens"] == 3
    (source,) = found["sources"]
    assert source["is_hit"]
    assert source["text"] in (LIGHTHOUSE, FERRY)
    assert 0 < source["question_mass"] < 1
    assert (source["dropped_at"], source["is_read"], source["span"]) == (None, True, None)

    assert [r["text"] for r in run("ls", "--json").object] == [LIGHTHOUSE, FERRY]
    assert run("stats", "--json").object["entries"] == 2
    assert run("reconcile", "--json").object["rebuilt"] == 0
    assert len(run("rm", "notes/b.md", "--json").object["removed"]) == 1
    found = run("doctor", model, "--json", "--questions", "1").object
    assert found["model"] == str(model)
    assert found["recommended"]["policy"] in {policy["name"] for policy in found["policies"]}


def test_caches_in_fewer_bits(run: Run, notes: Path, model: Path, assert_refused: Refused) -> None:
    def ingest(*options: str) -> Any:
        return run("ingest", notes, "--model", model, "--json", *options).object

    raw, coded = ingest(), ingest("--codec", "int8")
    assert coded["unchanged"] == raw["chunks"]
    assert coded["cache_bytes"] < 0.8 * raw["cache_bytes"]  # what was written raw is gone
    assert all(use["is_hit"] for use in run("ask", "Who?", "--json").object["sources"])
    stays = pytest.approx(coded["cache_bytes"], rel=0.001)  # the time of writing has more or fewer digits
    assert ingest()["cache_bytes"] == stays
    assert ingest("--codec", "raw")["cache_bytes"] == pytest.approx(raw["cache_bytes"], rel=0.001)
    assert_refused(run("ingest", notes, "--model", model, "--codec", "zip"), "no codec 'zip'")


def test_what_chunks_are_encoded_behind(run: Run, notes: Path, model: Path, assert_refused: Refused) -> None:
    """The choice is remembered, and can be changed."""
    home = Home(Path(".kvrag"))

    def chosen(*options: str) -> str:
        assert run("ingest", notes, "--model", model, *options).status == 0
        with home.corpus() as corpus:
            return str(corpus.context)

    assert [chosen(), chosen("--context", "similar:1"), chosen()] == ["before", "similar:1", "similar:1"]
    assert chosen("--context", "before/64") == "before/64"
    assert run("ask", "Who?", "--max-new-tokens", "2").status == 0
    assert_refused(run("ingest", notes, "--model", model, "--context", "after"), "expected alone, before")


def test_sampling_is_repeatable(ingested: Run) -> None:
    def answer(seed: int) -> str:
        options = ("--temperature", "1", "--seed", str(seed), "--max-new-tokens", "8", "--json")
        return str(ingested("ask", "Who?", *options).object["answer"])

    assert answer(1) == answer(1) != answer(2)


def test_lines_of_a_file_go_with_the_file(run: Run, model: Path, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text}) for text in (LIGHTHOUSE, FERRY))
    (tmp_path / "facts.jsonl").write_text(lines)
    assert run("ingest", "facts.jsonl", "--model", model).status == 0
    assert len(run("rm", "facts.jsonl", "--json").object["removed"]) == 2


def test_the_folder_comes_from_option_or_environment(
    run: Run, notes: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "my [bold]:smile: place"
    done = run("ingest", "notes", "--model", model, "--home", odd)
    assert str(odd) in done.out
    monkeypatch.setenv("KVRAG_HOME", str(odd))
    assert run("stats", "--json").object["chunks"] == 2
    assert not (tmp_path / ".kvrag").exists()


def test_a_wide_collection_fits_a_narrow_terminal(run: Run, model: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("folder " * 6) / "another"
    deep.mkdir(parents=True)
    (deep / "a file with a long name.txt").write_text("中文 " * 200)
    assert run("ingest", deep, "--model", model).status == 0
    done = run("ls")
    (record, *_) = run("ls", "--json").object
    assert all(cell_len(line) <= 80 for line in done.out.splitlines())
    assert record["id"] in done.out
    assert done.out.splitlines()[1].endswith("…")


def test_a_codec_is_chosen_by_what_it_loses_and_remembered(run: Run, notes: Path, model: Path) -> None:
    done = run("ingest", "notes", "--model", model, "--max-kl", "1000", "--json")
    assert done.status == 0
    codec = done.object["codec"]
    assert codec != "raw"
    assert f"codec {codec}: loses" in done.err
    assert run("ingest", "notes", "--json").object == {**done.object, "added": 0, "unchanged": 2}
    exact = run("ingest", "notes", "--max-kl", "0", "--json").object
    assert exact["codec"] == "raw"
    assert exact["cache_bytes"] > done.object["cache_bytes"]


def test_a_codec_cannot_be_both_named_and_chosen(
    run: Run, notes: Path, model: Path, assert_refused: Callable[[Any, str], None]
) -> None:
    done = run("ingest", "notes", "--model", model, "--max-kl", "1", "--codec", "int8")
    assert_refused(done, "give one of them")


def test_a_codec_is_chosen_for_the_model_and_remembered(
    run: Run, notes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvrag.trial import choice

    monkeypatch.setattr(choice, "_QUESTIONS", 1)
    auto = ("ingest", "notes", "--model", model, "--codec", "auto")
    done = run(*auto, "--max-kl", "1000")
    assert re.search("^codec (fp8|int8|int4), of those measured on this model$", done.err, re.MULTILINE)
    assert (Path(".kvrag") / "store" / choice.FILE).exists()
    assert Home(".kvrag").codec() != "raw"
    monkeypatch.setattr(choice, "scores_on", None)  # measured before
    assert run(*auto, "--max-kl", "0", "--json").object["codec"] == "raw"
