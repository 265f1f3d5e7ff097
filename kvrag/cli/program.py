"""The program: its commands in order, its exit statuses, and one line for each error."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer

from kvrag.cli import asking, chatting, collection, models, moving, planning, reading, upkeep
from kvrag.errors import KVRagError
from kvrag.terminal import stderr, stdout, tell

# Typer brings a Click of its own or uses the one there is, depending on the version.
CLICK_ERROR: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Answers over your documents from prebuilt KV caches: each document is read once, at ingestion.\n\n"
    'Example: kvrag ingest notes/, then kvrag ask "Who leads the project?"\n\n'
    "kvrag demo shows it on a made-up collection; kvrag COMMAND --help says more of each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        stdout().print(f"kvrag {version('kvrag')}")
        raise typer.Exit


@app.callback()
def _begin(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version)
    ] = False,
) -> None: ...


# In the order of the help; its line of a command is cut at 80 columns, so some have a shorter one.
_COMMANDS: tuple[tuple[str, Callable[..., None], str | None], ...] = (
    ("ingest", reading.ingest, "Read documents once, and keep their caches."),
    ("warm", reading.warm, "Build the caches that chunks lack."),
    ("ask", asking.ask, None),
    ("chat", chatting.chat, "Talk with a model whose memory does not grow."),
    ("sessions", chatting.sessions, "List saved conversations, or remove some."),
    ("ls", collection.list_documents, None),
    ("rm", collection.rm, "Remove chunks or files, and their caches."),
    ("stats", collection.stats, None),
    ("size", planning.size_up, "Say what caches would take, and which are worth it."),
    ("verify", upkeep.verify, "Prove every byte of every cache."),
    ("gc", upkeep.gc, None),
    ("reconcile", collection.reconcile, "Mend the caches after a crash."),
    ("pin", upkeep.pin, "Never evict the caches of some chunks."),
    ("unpin", upkeep.unpin, "Let the caches of some chunks be evicted again."),
    ("budget", upkeep.budget, "Show or set how much room caches may take."),
    ("export", moving.export, "Write the collection into one file."),
    ("import", moving.import_file, "Bring in what kvrag export wrote."),
    ("keygen", moving.keygen, "Make keys, to sign exports or to encrypt."),
    ("rekey", upkeep.rekey, "Encrypt everything here under another key."),
    ("doctor", models.doctor, "Prove that a model is read exactly; measure quality."),
    ("demo", models.demo, "Answer questions about a made-up collection."),
)
for _name, _function, _short in _COMMANDS:
    app.command(_name, short_help=_short)(_function)


def main() -> None:
    """Run the command line; exit status 2 and one line for bad input, 130 after Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    _quiet_libraries()
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="kvrag", standalone_mode=False)
    except CLICK_ERROR as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "kvrag"
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except KVRagError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    if status == 130:
        stderr().print("interrupted: what is complete stays; run the same command again to go on")
    sys.exit(status or 0)


def _fail(message: str) -> NoReturn:
    """One line, and out."""
    tell("error", message.strip().splitlines()[0])
    sys.exit(2)


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries below are not ours to show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
