"""The program: help, exit statuses, bad input, and nothing loaded for help."""

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
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvrag import cli
from kvrag.cli import program
from kvrag.home import Home

Run = Callable[..., Any]
Refused = Callable[[Any, str], None]
LIGHTHOUSE = "The lighthouse of Varn was built in 1871."
FERRY = "A ferry crosses the [bold]Mirrow[/bold] twice a :smile: day."
NOTE = "note: kvrag/reader is a tiny model"


COMMANDS = (
    "ingest warm ask chat sessions ls rm stats size verify gc reconcile pin unpin budget "
    "export import keygen rekey doctor demo"
).split()


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


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ingest", "nowhere"], "nowhere: no such file or folder"),
        (["ingest", "photo.png"], r"photo.png: cannot read this type of file; expected .*\.txt"),
        (["ingest", "latin.txt"], "latin.txt: not UTF-8 at byte 1"),
        (["ingest", "noise.txt"], "noise.txt: this is no text"),
        (["ingest", "folder"], "no text found in folder; kvrag reads .txt"),
        (["size", "folder"], "no text found in folder; kvrag reads .txt"),
        (
            ["ingest", "good.txt", "--model", "/no/folder"],
            "'/no/folder' could not be loaded: there is no such",
        ),
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
        (["warm"], "there is no collection 'kvrag' here; run kvrag ingest PATH"),
        (["verify"], "nothing was ingested"),
        (["verify", "--rate", "fast"], "rate is 'fast'; expected a size such as 500MB"),
        (["gc"], "nothing was ingested"),
        (["gc", "--quarantine-days", "-1"], "--quarantine-days"),
        (["pin", "x"], "nothing was ingested"),
        (["unpin"], "Missing argument.*kvrag unpin --help"),
        (["budget"], "nothing was ingested"),
        (["export", "x.kvrag"], "nothing was ingested"),
        (["export", "x.kvrag", "--sign", "nowhere"], "nowhere: cannot be read.*kvrag keygen"),
        (["export", "good.txt"], "good.txt exists; .*--force"),
        (["import", "nowhere"], "nowhere: cannot be read"),
        (["import", "good.txt", "--allow-unsigned"], "good.txt is no kvrag export; nothing was changed"),
        (["import", "good.txt", "--trust", "good.txt"], "good.txt: not a public key"),
        (["import", "good.txt", "--usable-only"], "--usable-only needs to know .*--model"),
        (["keygen", "good.txt"], "good.txt exists; keys are never overwritten"),
        (["size", "nowhere"], "nowhere: no such file or folder"),
        (["size", "good.txt", "--model", "nowhere"], "model 'nowhere' could not be found"),
        (["size", "good.txt", "--model", "MODEL", "--codec", "zip"], "no codec 'zip'; expected one of raw"),
        (["size", "good.txt", "--model", "MODEL", "--dtype", "int8"], "dtype is 'int8'; expected"),
        (["size", "blank.txt", "--model", "MODEL"], "no text found"),
        (
            ["ingest", "good.txt", "--model", "MODEL", "--ttl", "soon"],
            "ttl is 'soon'; expected a time such as",
        ),
        (["ingest", "good.txt", "--model", "MODEL", "--budget", "0"], "budget is '0'; expected a size"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    run: Run, tmp_path: Path, model: Path, arguments: list[str], reason: str, assert_refused: Refused
) -> None:
    (tmp_path / "photo.png").write_bytes(b"png")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin1"))
    (tmp_path / "noise.txt").write_bytes(b"\xff\0")
    (tmp_path / "folder").mkdir()
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
        (["rm", "notes/a.txt", "--receipt", "notes/a.txt"], "notes/a.txt exists; receipts are never"),
        (["pin", "nobody"], "nothing is called nobody; kvrag ls shows"),
        (["budget", "lots"], "budget is 'lots'; expected a size"),
        (["warm", "--collection", "other"], "there is no collection 'other' here"),
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
def test_bad_input_changes_nothing(
    ingested: Run, arguments: list[str], reason: str, assert_refused: Refused
) -> None:
    assert_refused(ingested(*arguments), reason)
    assert ingested("stats", "--json").object["chunks"] == 2


def test_an_unknown_kind_of_model_is_one_line(
    run: Run, notes: Path, model: Path, tmp_path: Path, assert_refused: Refused
) -> None:
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
    assert counts.documents == 4000  # all of them are there, and read anew where their entry is not built yet
    assert 32 <= counts.store.entries < 4000


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
