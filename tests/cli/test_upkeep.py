"""What lies on the disk: proving it, sweeping, receipts, pins, budgets, times to live, warming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrag.home import Home
from kvrag.testing.files import holding

Run = Callable[..., Any]
Refused = Callable[[Any, str], None]


def store_files(pattern: str) -> list[Path]:
    return sorted((Path(".kvrag") / "store").glob(pattern))


def damage(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-40] ^= 1
    file.unlink()
    file.write_bytes(raw)


# ---- verify


def test_nothing_is_wrong(ingested: Run) -> None:
    done = ingested("verify", "--rate", "100MB")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[0].startswith("2 caches, ")
    assert done.out.splitlines()[-1] == "nothing is wrong"
    assert ingested("verify", "--json").object["ok"]


def test_damage_is_found_and_mended(ingested: Run) -> None:
    damage(store_files("??/*.safetensors")[0])
    for _ in range(2):  # without --fix nothing changes
        done = ingested("verify")
        assert done.status == 1
        assert "1 caches are damaged: " in done.out
        assert "mend it with: kvrag verify --fix" in done.out
        assert "1 chunks have no usable cache" in done.out
        assert all(len(line) <= 80 for line in done.out.splitlines())
    found = ingested("verify", "--fix", "--json")
    assert found.status == 1
    assert len(found.object["store"]["damaged"]) == 1
    assert len(store_files("quarantine/*")) == 2
    done = ingested("verify")
    assert done.status == 0
    assert "1 chunks have no usable cache; build them with: kvrag warm" in done.out
    assert ingested("warm", "--json").object["built"] == 1
    assert ingested("verify", "--json").object["uncached"] == []


def test_references_are_compared_with_documents(ingested: Run) -> None:
    with Home(".kvrag").corpus() as corpus:
        first, second = sorted(record.id for record in corpus.documents())
        corpus._references.remove(corpus._index.id, [first])
        corpus._references.add(corpus._index.id, {"gone": corpus.entries_of([second])[second]})
    found = ingested("verify", "--json")
    assert found.status == 1
    assert (found.object["unreferenced"], found.object["stale"]) == ([first], ["gone"])
    assert ingested("verify", "--fix").status == 1
    assert ingested("verify").status == 0
    with Home(".kvrag").corpus() as corpus:
        assert set(corpus.entries_of([first, second, "gone"])) == {first, second}


def test_files_of_no_cache_are_found(ingested: Run) -> None:
    lone = store_files("??")[0] / ("ab" * 32 + ".safetensors")
    lone = lone.parent.parent / "ab" / lone.name
    lone.parent.mkdir(exist_ok=True)
    lone.write_bytes(b"x" * 100)
    assert ingested("verify", "--json").object["store"]["orphans"] == [f"ab/{lone.name}"]
    done = ingested("gc", "--dry-run")
    assert "orphans                  1       100 B" in done.out
    assert f"  ab/{lone.name}" in done.out
    assert done.out.splitlines()[-1] == "100 B would be removed"
    assert lone.exists()
    assert ingested("gc", "--json").object["num_bytes"] == 100
    assert not lone.exists()
    assert ingested("gc").out == "nothing to remove\n"


# ---- gc


def test_every_kind_of_rubbish(ingested: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(".kvrag")
    first, second = store_files("??/*.safetensors")
    store = home.store()
    assert store.expire(first.stem, 0.001)
    store.close()
    with home.corpus() as corpus:  # as if the document had gone and the cache stayed
        (owner,) = [
            i for i, e in corpus.entries_of([r.id for r in corpus.documents()]).items() if e == second.stem
        ]
        corpus._references.remove(corpus._index.id, [owner])
    (home.path / "import-dead.partial").mkdir()
    (home.path / "import-dead.partial" / "x").write_bytes(b"12345")
    found = ingested("gc", "--dry-run", "--json").object
    assert {some["kind"]: some["names"] for some in found["rubbish"]} == {
        "expired": [first.stem],
        "unreferenced": [second.stem],
        "imports": ["import-dead.partial"],
    }
    assert first.exists()
    assert ingested("gc", "--json").object["rubbish"] == found["rubbish"]
    assert store_files("??/*.*") == []
    assert not (home.path / "import-dead.partial").exists()


def test_old_quarantine_goes(ingested: Run) -> None:
    damage(store_files("??/*.safetensors")[0])
    ingested("verify", "--fix")
    assert ingested("gc").out == "nothing to remove\n"
    found = ingested("gc", "--quarantine-days", "0", "--json").object
    assert [some["kind"] for some in found["rubbish"]] == ["quarantine"]
    assert store_files("quarantine/*") == []


# ---- receipts


def test_rm_gives_a_receipt(ingested: Run) -> None:
    (entry,) = {e["entry"] for e in [_entry_of("notes/a.txt")]}
    done = ingested("rm", "notes/a.txt", "--receipt", "receipt.json")
    assert done.out.startswith("removed 1 chunk with all caches (")
    assert f"  disk: {entry[:2]}/{entry[:12]}….safetensors" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())
    receipt = json.loads(Path("receipt.json").read_text())
    (erased,) = receipt["erased"]
    assert erased["key_id"] == entry
    assert f"disk: {entry[:2]}/{entry}.safetensors" in erased["erased"]
    assert receipt["num_bytes"] == erased["num_bytes"] > 1000
    assert (receipt["texts_overwritten"], receipt["kept"]) == (True, [])
    assert receipt["seconds"] > 1.7e9


def _entry_of(source: str) -> dict[str, str]:
    with Home(".kvrag").corpus() as corpus:
        (record,) = [r.id for r in corpus.documents() if r.metadata["source"] == source]
        return {"record": record, "entry": corpus.entries_of([record])[record]}


def test_shared_caches_stay(run: Run, notes: Path, model: Path) -> None:
    (notes / "copy.txt").write_text((notes / "a.txt").read_text())
    assert run("ingest", "notes", "--model", model).status == 0
    done = run("rm", "notes/copy.txt")
    assert "1 caches stay: other chunks have the same text" in done.out
    assert len(store_files("??/*.safetensors")) == 2


def test_no_byte_of_a_removed_text_is_left(ingested: Run) -> None:
    assert holding(Path(".kvrag"), b"lighthouse of Varn")
    ingested("rm", "notes/a.txt")
    assert holding(Path(".kvrag"), b"lighthouse of Varn") == []
    assert holding(Path(".kvrag"), b"Mirrow")
    assert ingested("ask", "Where is the ferry?", "--max-new-tokens", "2", "--json").object["sources"][0][
        "is_hit"
    ]
    assert ingested("verify").status == 0


# ---- pins, budgets, times to live


def test_pinned_caches_outlive_a_small_budget(run: Run, model: Path) -> None:
    folder = Path("many")
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"Document {number} tells of {number + 1000}. " * 4)
    whole = run("ingest", "many", "--model", model, "--json").object["cache_bytes"]
    assert "pinned the caches of 1 chunk" in run("pin", "many/0.txt").out
    evicted = run("budget", str(whole // 2), "--json").object["evicted"]
    assert 3 <= evicted <= 4
    assert run("stats", "--json").object["pinned_bytes"] > 0
    store = Home(".kvrag").store()
    assert _entry_of("many/0.txt")["entry"] in store
    store.close()
    # Ingesting again does not chase evicted caches in a circle.
    again = run("ingest", "many", "--model", model, "--json").object
    assert (again["unchanged"], again["evicted"]) == (6, 0)
    warmed = run("warm", "--json").object
    assert warmed["is_full"] or warmed["built"] <= 1
    assert run("budget", "--json").object["cache_bytes"] <= whole // 2
    assert run("unpin", "many/0.txt", "--json").object["unpinned"]
    assert run("budget", "none").out.rstrip().endswith("no limit")
    assert run("warm", "--json").object["is_full"] is False
    assert run("stats", "--json").object["entries"] == 6


def test_warming_ends_where_the_first_cache_pushes_out_another(run: Run, model: Path) -> None:
    folder = Path("many")
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"Document {number} tells of {number + 1000}. " * 4)
    whole = run("ingest", "many", "--model", model, "--json").object["cache_bytes"]
    run("budget", str(int(whole * 0.45)))  # two and a half caches fit, give or take
    warmed = run("warm", "--json").object
    assert (warmed["built"], warmed["is_full"]) == (1, True)
    assert run("stats", "--json").object["entries"] == 2


def test_a_budget_below_the_pinned_is_refused(ingested: Run, assert_refused: Refused) -> None:
    ingested("pin", "notes/a.txt", "notes/b.md")
    assert_refused(ingested("budget", "1kB"), "are pinned, more than 1kB; let some go with kvrag unpin")
    assert ingested("budget", "--json").object["budget_bytes"] is None


def test_settings_are_remembered(run: Run, notes: Path, model: Path) -> None:
    run("ingest", "notes", "--model", model, "--ttl", "30d", "--budget", "20GB", "--pin")
    found = run("stats", "--json").object
    assert (found["ttl_seconds"], found["budget_bytes"]) == (30 * 86400, 20 * 10**9)
    assert found["pinned_bytes"] == found["cache_bytes"] > 0
    (notes / "c.txt").write_text("The orchard at Lindal grows apples.")
    run("ingest", "notes", "--model", model)
    store = Home(".kvrag").store()
    assert all(entry.expires is not None for entry in store.entries())
    store.close()
    run("ingest", "notes", "--model", model, "--ttl", "never")
    assert all(entry.expires is None for entry in Home(".kvrag").store().entries())


# ---- warm


def test_a_collection_that_somebody_else_has_filled(run: Run, model: Path, tmp_path: Path) -> None:
    index = Home(".kvrag").index()
    index.add(
        ["x", "y", "long"], ["A ferry crosses.", "A mill grinds.", "word " * 9000], [{"page": 1}, {}, {}]
    )
    index.close()
    done = run("warm", "--model", model, "--only-missing", "--order", "long")
    assert done.status == 0
    assert done.out.startswith("3 chunks: 2 caches built (")
    assert "warning: long cannot be read by this model" in done.err
    index = Home(".kvrag").index()
    assert index.get(["x"])[0].metadata == {"page": 1}  # nothing was written into it
    index.close()
    found = run("warm", "--json").object
    assert (found["built"], found["known"]) == (0, 2)
    assert all(
        use["is_hit"]
        for use in run("ask", "A ferry crosses.", "-k", "1", "--max-new-tokens", "2", "--json").object[
            "sources"
        ]
    )
    assert run("verify").status == 0


@pytest.mark.parametrize("order", ["stored", "short", "long"])
def test_an_interrupted_warm_goes_on(ingested: Run, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in list((store := Home(".kvrag").store()).ids()):
        store.delete(entry)
    store.close()
    with monkeypatch.context() as patch:
        patch.setattr("kvrag.lockstep.Lockstep.encode_missing", _interrupted)
        done = ingested("warm", "--order", order)
    assert done.status == 130
    assert ingested("warm", "--order", order, "--json").object["built"] == 2


def _interrupted(*_: Any) -> int:
    raise KeyboardInterrupt
