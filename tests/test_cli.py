"""The command line: every command, what is printed where, exit statuses, and nothing loaded for help."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

import kvrag.reader
from kvrag import cli, doctor
from kvrag.cli import asking, program
from kvrag.engine import Engine
from kvrag.focus.policy import PRESETS
from kvrag.home import Home
from kvrag.model import READER
from kvrag.testing.models import tiny_model, tiny_tokenizer

COMMANDS = ["ingest", "ask", "ls", "rm", "stats", "reconcile", "doctor", "demo"]
LIGHTHOUSE = "The lighthouse of Varn was built in 1871."
FERRY = "A ferry crosses the [bold]Mirrow[/bold] twice a :smile: day."
NOTE = "note: kvrag/reader is a tiny model"


@dataclass(frozen=True)
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def object(self) -> Any:
        """The one object on standard output."""
        assert self.status in (0, 1), self.err
        (line,) = self.out.splitlines()
        return json.loads(line)


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on the disk."""
    made = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process, as the installed program runs it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVRAG_HOME", raising=False)

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["kvrag", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        status = ended.value.code
        assert isinstance(status, int)
        return Done(status, printed.out, printed.err)

    return call


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Two files of documents."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text(LIGHTHOUSE)
    (folder / "b.md").write_text(FERRY)
    return folder


@pytest.fixture
def ingested(run: Run, notes: Path, model: Path) -> Run:
    assert run("ingest", "notes", "--model", model).status == 0
    return run


def assert_refused(done: Done, reason: str) -> None:
    """Exit status 2, one line on standard error, nothing on standard output."""
    assert done.status == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(reason, line), line


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=80)
    assert done.exit_code == 0
    assert f"Example: kvrag {command}" in done.output
    assert "\x1b" not in done.output
    assert max(map(len, done.output.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_program_lists_its_commands(run: Run, arguments: Sequence[str]) -> None:
    done = run(*arguments)
    assert done.status == 0
    assert done.err == ""
    assert re.findall(r"^  ([a-z]+)  ", done.out, flags=re.MULTILINE) == COMMANDS
    assert "..." not in done.out.partition("Commands:")[2]


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_help_waits_for_no_library() -> None:
    code = (
        "import sys; from kvrag.cli import main; sys.argv = ['kvrag', 'ask', '--help']\n"
        "try:\n    main()\nexcept SystemExit as e:\n"
        "    heavy = {'torch', 'transformers', 'chromadb', 'numpy'} & set(sys.modules)\n"
        "    print('STATUS', e.code, sorted(heavy))"
    )
    assert fresh(code).splitlines()[-1] == "STATUS 0 []"


# ---- the commands, one after the other


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

    assert "removed 1 chunks" in run("rm", "notes/a.txt").out
    assert run("stats", "--json").object["chunks"] == 1
    (left,) = run("ls", "--json").object
    assert run("rm", left["id"]).status == 0
    assert list((Path(".kvrag") / "store").rglob("*.safetensors")) == []


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


def test_caches_in_fewer_bits(run: Run, notes: Path, model: Path) -> None:
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


# ---- policies


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


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ingest", "nowhere"], "nowhere: no such file or folder"),
        (["ingest", "photo.png"], r"photo.png: cannot read this type of file; expected .*\.txt"),
        (["ingest", "latin.txt"], "latin.txt: not UTF-8 at byte 1"),
        (["ingest", "broken.jsonl"], "broken.jsonl, line 1: not JSON"),
        (["ingest"], "Missing argument.*kvrag ingest --help"),
        (["ingest", "good.txt", "--chunk-tokens", "0"], "--chunk-tokens"),
        (["ingest", "good.txt", "--model", "no/such-model"], "model 'no/such-model' could not be loaded"),
        (["ingest", "blank.txt", "--model", "MODEL"], "no text found"),
        (["ingest", "good.txt", "--model", "MODEL", "--dtype", "float99"], "dtype is 'float99'; expected"),
        (["ingest", "good.txt", "--model", "MODEL", "--device", "nonsense"], "device is 'nonsense'"),
        (["ingest", "good.txt", "--model", "MODEL", "--home", "good.txt"], "cannot write"),
        (["ask", "Who?"], r"nothing was ingested in \.kvrag; run: kvrag ingest PATH"),
        (["ask", " "], "the question is empty"),
        (["ask"], "Missing argument.*kvrag ask --help"),
        (["ask", "Who?", "-k", "0"], "-k"),
        (["ask", "Who?", "--temperature", "-1"], "--temperature"),
        (["ask", "Who?", "--max-new-tokens", "many"], "--max-new-tokens.*integer"),
        (["ask", "Who?", "--nonsense"], "No such option.*--nonsense"),
        (["ask", "Who?", "--policy", "magic"], "no policy 'magic'; expected one of ape, .*query-driven"),
        (["ask", "Who?", "--keep", "some"], "keep is 'some'; expected a number of documents"),
        (["ask", "Who?", "--keep", "0"], "keep=0: expected at least 1 document"),
        (["ask", "Who?", "--keep", "1.5"], "keep=1.5: expected a share"),
        (["ask", "Who?", "--repair", "2"], "share=2.0: expected 0 to 1"),
        (["ask", "Who?", "--repair", "nan"], "share=nan: expected 0 to 1"),
        (["ask", "Who?", "--repair", "half"], "--repair"),
        (["ask", "Who?", "--policy", "epic", "--repair", "0.1"], "'epic' reads the first rows"),
        (["ask", "Who?", "--max-risk", "-1"], "max_risk=-1.0: expected 0 to 1"),
        (["ask", "Who?", "--max-risk", "nan"], "max_risk=nan: expected 0 to 1"),
        (["ask", "Who?", "--layers", "1"], "'plain' does not prune; set keep, or take cachefocus"),
        (["ask", "Who?", "--keep", "1", "--layers", "one"], "layers is 'one'; expected numbers of layers"),
        (["ask", "Who?", "--keep", "1", "--rows", "first"], "--rows.*'question', 'last'"),
        (["doctor", "MODEL", "--questions", "0"], "--questions"),
        (["ls"], "nothing was ingested"),
        (["ls", "--home", "good.txt"], "good.txt.*cannot be read"),
        (["rm", "x"], "nothing was ingested"),
        (["stats"], "nothing was ingested"),
        (["reconcile"], "nothing was ingested"),
        (["doctor", "nowhere"], "model 'nowhere' could not be loaded"),
        (["doctor", "MODEL", "--device", "cuda:99"], "device is 'cuda:99'"),
        (["demo", "--questions", "0"], "--questions"),
        (["demo", "--model", "nowhere"], "model 'nowhere' could not be loaded"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    run: Run, tmp_path: Path, model: Path, arguments: list[str], reason: str
) -> None:
    (tmp_path / "photo.png").write_bytes(b"png")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin1"))
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "good.txt").write_text(LIGHTHOUSE)
    (tmp_path / "blank.txt").write_text("\n")
    assert_refused(run(*(str(model) if a == "MODEL" else a for a in arguments)), reason)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ask", "Who?", "--seed", "-1"], "seed is -1"),
        (["ask", "Who?", "--temperature", "nan"], "temperature"),
        (["rm", "nobody", "notes/a.txt"], "nothing is called nobody; kvrag ls shows"),
        (["ask", "Who?", "--model", "nowhere"], "model 'nowhere' could not be loaded"),
        (
            ["ask", "Who?", "--layers", "3", "--keep", "1"],
            "layers is 3; pruning .* can use 0 to 2 of this model",
        ),
        (["ask", "Who?", "--layers=-1,2", "--keep", "1"], "layers is -1, 2; pruning .* can use 0 to 2"),
        (["ask", "Who? " * 1000], "reads 4096; .* retrieve fewer"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_bad_input_changes_nothing(ingested: Run, arguments: list[str], reason: str) -> None:
    assert_refused(ingested(*arguments), reason)
    assert ingested("stats", "--json").object["chunks"] == 2


def test_an_unknown_kind_of_model_is_one_line(run: Run, notes: Path, model: Path, tmp_path: Path) -> None:
    for kind in ("t5", "foobar"):
        shutil.copytree(model, tmp_path / kind)
        config = json.loads((model / "config.json").read_text())
        (tmp_path / kind / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        done = run("ingest", "notes", "--model", tmp_path / kind)
        assert_refused(done, f"{kind}' is not a decoder that transformers knows")


def test_options_of_the_error_classes_are_found() -> None:
    """Typer's Click is its own or another, depending on the version."""
    assert issubclass(typer.BadParameter, program.CLICK_ERROR)
    assert hasattr(program.CLICK_ERROR, "format_message")


# ---- the shipped reader


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


# ---- the doctor


def test_the_doctor_is_content_with_a_good_model(run: Run, model: Path) -> None:
    done = run("doctor", model, "--questions", "1")
    assert done.status == 0
    assert "exact to rounding" in done.out
    assert "against full attention (1 questions over 8 documents, 9 tokens each)" in done.out
    assert "recommended: " in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines()[1:])  # the first one has the model's name


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


# ---- real processes


def start(*arguments: str | Path, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvrag.cli", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in ("KVRAG_HOME", "FORCE_COLOR")}
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_as_a_program(notes: Path, model: Path, tmp_path: Path) -> None:
    """In a pipe: no colours, no bars, nothing on standard error."""
    for arguments in (["ingest", "notes", "--model", model], ["ask", "Who?", "--max-new-tokens", "4"]):
        program = start(*arguments, cwd=tmp_path)
        out, err = program.communicate(timeout=300)
        assert (program.returncode, err) == (0, "")
        assert out
        assert "\x1b" not in out


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_complete(model: Path, tmp_path: Path) -> None:
    lines = (json.dumps({"text": f"Document {i} tells of {i + 1000}. " * 8}) for i in range(4000))
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    program = start("ingest", "many.jsonl", "--model", model, cwd=tmp_path, start_new_session=True)
    store = tmp_path / ".kvrag" / "store"
    until = time.monotonic() + 240
    while program.poll() is None and len(list(store.glob("??/*.json"))) < 40 and time.monotonic() < until:
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=240)
    assert program.returncode == 130, err
    assert out == ""
    assert err == "interrupted: what is complete stays; run the same command again to go on\n"
    with Home(tmp_path / ".kvrag").corpus() as corpus:
        counts = corpus.stats()
    assert 32 <= counts.documents < 4000
    assert counts.store.entries >= counts.documents


def test_ctrl_c_in_an_answer(ingested: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvrag.rag.ask", interrupted)
    done = ingested("ask", "Who?")
    assert done.status == 130
    assert done.err.startswith("interrupted: ")


def test_unexpected_errors_are_plain_tracebacks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours to mend, so nothing is hidden; and no boxes drawn around it."""

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("kvrag.cli.collection.open_home", fails)
    monkeypatch.setattr(sys, "argv", ["kvrag", "stats"])
    before = sys.excepthook
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main()
    assert sys.excepthook is before
