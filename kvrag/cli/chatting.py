"""kvrag chat, sessions: conversations whose memory does not grow."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrag.cli.opening import load_engine, open_home, warn_of_reader
from kvrag.config import Sampling
from kvrag.errors import InputError
from kvrag.options import (
    DeviceOption,
    DtypeOption,
    HomeOption,
    JsonOption,
    LongestOption,
    ModelOption,
    SeedOption,
    TemperatureOption,
    TenantOption,
)
from kvrag.terminal import print_json, print_table, size, stdout

# Written out, since help must not wait for torch; a test compares them with what there is.
MEMORIES = "cascade, window, ladder, combined, salient or full"


def chat(
    session: Annotated[
        str | None,
        typer.Option(
            "--session", help="Keep the conversation under this name, or go on with it.", metavar="NAME"
        ),
    ] = None,
    load: Annotated[
        Path | None, typer.Option("--load", help="Go on from a file that /save wrote.", metavar="FILE")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help=f"What stays in memory: {MEMORIES} [cascade].", metavar="MEMORY"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="How much stays: 4096 tokens, or 512MB [4096].", metavar="SIZE"),
    ] = None,
    sub_caches: Annotated[
        int | None,
        typer.Option(
            "--sub-caches", help="Windows in a row, of cascade and combined [4].", min=1, metavar="NUMBER"
        ),
    ] = None,
    span: Annotated[
        int | None,
        typer.Option(
            "--span", help="Layers that keep a place, of ladder and combined.", min=1, metavar="NUMBER"
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told first.", metavar="TEXT")
    ] = None,
    document: Annotated[
        list[Path] | None,
        typer.Option("--document", help="A file that is always in memory; may be repeated.", metavar="FILE"),
    ] = None,
    archive: Annotated[
        bool,
        typer.Option("--archive", help="Keep all that is said, and bring back what is needed again."),
    ] = False,
    model: ModelOption = None,
    folder: HomeOption = None,
    tenant: TenantOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    max_new_tokens: LongestOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
) -> None:
    """Talk with a model that reads only what is new and keeps a memory that does not grow.

    One message a line, also from a pipe; /help says what else can be done. Ctrl-C stops an answer, and
    leaves when there is none.

    Example: kvrag chat --session jane --budget 512MB
    """
    from kvrag.cli.talking import Conversation  # noqa: PLC0415 - help texts must not wait for torch

    place = open_home(folder, None, "kvrag", tenant)
    if archive and session is None:
        raise InputError("--archive is for a conversation that is kept; name it with --session NAME")
    documents = _documents(document or [])
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    with load_engine(place, model, device, dtype) as engine, _kept(place, engine) as kept:
        warn_of_reader(engine, place)
        policy = _policy(engine, memory, budget, {"sub_caches": sub_caches, "span": span})
        made: dict[str, Any] = {"system": system, "documents": [one.text for one in documents]}
        if load is not None:
            if policy is not None or system is not None or documents or archive:
                raise InputError("--load goes on with what the file was made with; leave the others out")
            opened = kept.load(engine, load, session)
        elif session is not None:
            opened = kept.open(engine, session, policy, is_archived=archive, **made)
        else:
            opened = engine.session(policy, **made) if policy else engine.session(**made)
        Conversation(engine, kept, opened, sampling, names=[one.source for one in documents]).run()


def _kept(place: Any, engine: Any = None) -> Any:
    """The conversations of a folder; without an engine to list and remove them."""
    from kvrag.conversations import Conversations  # noqa: PLC0415 - help texts must not wait for torch

    def archives(create: bool) -> Any:
        return place.archive(engine) if create or place.has_archive() else None

    return closing(Conversations(place.sessions, place.vault(), archives=archives))


def _documents(paths: list[Path]) -> list[Any]:
    """What files say."""
    if not paths:
        return []
    from kvrag import documents as files  # noqa: PLC0415

    return list(files.load(paths))


def _policy(engine: Any, name: str | None, budget: str | None, settings: dict[str, Any]) -> Any:
    """The memory that the options describe; None if they do not."""
    from kvrag.memory.policies import memory_policy  # noqa: PLC0415

    given = {key: value for key, value in settings.items() if value is not None}
    if name is None and budget is None and not given:
        return None
    chosen = name or "cascade"
    if budget is None and chosen != "full":
        budget = str(min(4096, engine.model.max_length // 2))
    return memory_policy(chosen, budget, bytes_per_token=engine.model.bytes_per_token, **given)


def sessions(
    rm: Annotated[
        list[str] | None,
        typer.Option("--rm", help="Remove this conversation; may be repeated.", metavar="NAME"),
    ] = None,
    folder: HomeOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the conversations that kvrag chat has kept, or remove some, archives included.

    Example: kvrag sessions --rm jane
    """
    with _kept(open_home(folder, None, "kvrag", tenant)) as kept:
        known = {one.name for one in kept.listed()}
        if missing := sorted(set(rm or ()) - known):
            raise InputError(f"no session is called {', '.join(missing)}; kvrag sessions lists them")
        for name in rm or ():
            kept.delete(name)
        found = kept.listed()
    if as_json:
        print_json({"removed": sorted(rm or ()), "sessions": [asdict(one) for one in found]})
        return
    for name in rm or ():
        stdout().print(f"removed {name}")
    if not rm:
        print_sessions(found)


def print_sessions(found: list[Any]) -> None:
    """A table of saved conversations."""
    if not found:
        stdout().print("no conversation is kept here; kvrag chat --session NAME keeps one")
        return
    rows = [
        (
            one.name,
            f"{one.num_turns}",
            f"{one.num_tokens}",
            (one.memory if one.budget is None else f"{one.memory} {one.budget}")
            + (" + archive" if one.is_archived else ""),
            size(one.num_bytes),
            datetime.fromtimestamp(one.saved_at).strftime("%Y-%m-%d %H:%M"),
        )
        for one in found
    ]
    print_table(("session", "turns", "tokens", "memory", "on disk", "saved"), rows)
