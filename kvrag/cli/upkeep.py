"""kvrag verify, gc, pin, unpin, budget, rekey: what lies on the disk, how long, and under which key."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrag.cli.opening import chosen_ids, open_home, pin_entries, secret
from kvrag.config import store_key
from kvrag.errors import InputError
from kvrag.options import (
    ChromaOption,
    CollectionOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    NamesArgument,
    RateOption,
    TenantOption,
    parse_budget,
    parse_size,
)
from kvrag.terminal import bytes_bar, count, print_json, progress_bar, size, stdout, tell

_SHOWN = 5


def verify(
    fix: Annotated[
        bool, typer.Option("--fix", help="Set damaged caches aside, mend index and references.")
    ] = False,
    rate: RateOption = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of every cache, and compare the index with the files, references with documents.

    Exit status 1 if something is wrong, also if it was mended. Documents without a cache are slow, not wrong:
    kvrag warm builds them.

    Example: kvrag verify --fix --rate 200MB
    """
    from kvrag.scrub import verify as scrub  # noqa: PLC0415 - help texts must not wait for torch

    place = open_home(folder, chroma, collection, tenant)
    limit = None if rate is None else parse_size(rate, "rate")
    with bytes_bar("verifying") as progress:
        report = scrub(place, fix=fix, bytes_per_second=limit, progress=progress)
    if as_json:
        print_json({"ok": report.ok, **asdict(report)})
    else:
        _print_verified(report)
    if not report.ok:
        raise typer.Exit(1)


def _print_verified(report: Any) -> None:
    out = stdout()
    spans = f", {count(report.spans, 'span')} of chats" if report.spans else ""
    caches = f"{count(report.entries, 'cache')}, {size(report.num_bytes)}"
    out.print(f"{caches}; {count(report.records, 'chunk')}{spans}")
    rows = (
        ("caches are damaged", report.store.damaged, "set aside; kvrag warm builds them anew"),
        ("files belong to no cache", report.store.orphans, "removed"),
        ("caches are not what the index says", report.store.index, "mended"),
        ("references are to chunks that are gone", report.stale, "removed"),
        ("chunks refer to no cache", report.unreferenced, "mended"),
    )
    for what, names, mended in rows:
        if names:
            out.print(f"{len(names)} {what}: {_some(names)}" + (f" ({mended})" if report.fixed else ""))
    if report.ok:
        out.print("nothing is wrong")
    elif not report.fixed:
        out.print("mend it with: kvrag verify --fix")
    if report.uncached:
        out.print(f"{len(report.uncached)} chunks have no usable cache; build them with: kvrag warm")
    if report.uncached_spans:
        out.print(f"{len(report.uncached_spans)} spans of chats have no usable cache; they are read anew")


def _some(names: tuple[str, ...]) -> str:
    """The first few names, short."""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name if len(name) < 60 else name[:12] for name in names[:_SHOWN]) + more


def gc(
    dry_run: DryRunOption = False,
    quarantine_days: Annotated[
        float,
        typer.Option(help="Days to keep damaged caches that were set aside.", min=0.0, metavar="DAYS"),
    ] = 30.0,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what nobody needs.

    That is: expired caches, what crashes and killed imports left behind, caches that no document refers to,
    what is beyond the budget, and damaged caches that were set aside long ago.

    Example: kvrag gc --dry-run
    """
    from kvrag.scrub import DAY, collect  # noqa: PLC0415

    place = open_home(folder, chroma, collection, tenant)
    result = collect(place, quarantine_seconds=quarantine_days * DAY, dry_run=dry_run)
    if as_json:
        print_json({**asdict(result), "num_bytes": result.num_bytes})
        return
    out = stdout()
    for some in result.rubbish:
        out.print(f"{some.kind:<18} {len(some.names):>7}  {size(some.num_bytes):>10}")
        if dry_run:
            for name in some.names:
                out.print(f"  {name}")
    would = "would be" if dry_run else "were"
    out.print(f"{size(result.num_bytes)} {would} removed" if result.rubbish else "nothing to remove")


def pin(
    names: NamesArgument,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Never evict the caches of these chunks, sources or files, however full the store is.

    Pinned caches still expire, and go with their documents.

    Example: kvrag pin handbook.pdf
    """
    _pin(names, folder, chroma, collection, tenant, pinned=True, as_json=as_json)


def unpin(
    names: NamesArgument,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the caches of these chunks, sources or files be evicted again.

    Example: kvrag unpin handbook.pdf
    """
    _pin(names, folder, chroma, collection, tenant, pinned=False, as_json=as_json)


def _pin(names: list[str], *place_of: Any, pinned: bool, as_json: bool) -> None:
    place = open_home(*place_of)
    place.must_exist()
    with place.corpus() as corpus, closing(place.store()) as store:
        ids = chosen_ids(corpus, names)
        lacking = pin_entries(corpus, store, ids, pinned=pinned)
    done = [i for i in ids if i not in lacking]
    if as_json:
        print_json({"pinned" if pinned else "unpinned": done, "without_cache": lacking})
        return
    stdout().print(f"{'pinned' if pinned else 'unpinned'} the caches of {count(len(done), 'chunk')}")
    if lacking:
        tell("warning", f"{len(lacking)} chunks have no cache; build them first with: kvrag warm")


def budget(
    limit: Annotated[
        str | None,
        typer.Argument(
            help="Most bytes of all caches: 20GB, 500MB; none for no limit.",
            show_default=False,
            metavar="SIZE",
        ),
    ] = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how much room the caches take, or set how much they may take from now on.

    When it is full, what is worth least goes first: seldom used, cheap to read anew, large. Pinned ones stay.

    Example: kvrag budget 20GB
    """
    place = open_home(folder, chroma, collection, tenant)
    most = place.settings().budget_bytes
    with closing(place.store()) as store:
        pinned = sum(entry.num_bytes for entry in store.entries() if entry.pinned)
    if limit is not None:
        most = parse_budget(limit)
        if most is not None and pinned > most:
            raise InputError(
                f"{size(pinned)} of caches are pinned, more than {limit}; let some go with kvrag unpin first"
            )
        place.change(budget_bytes=most)
    with closing(place.store()) as store:
        evicted = len(store.sweep().evicted) if limit is not None else 0
        num_bytes = store.stats().num_bytes
    result = {
        "budget_bytes": most,
        "cache_bytes": num_bytes,
        "pinned_bytes": pinned,
        "evicted": evicted,
    }
    if as_json:
        print_json(result)
        return
    words = "no limit" if most is None else f"a budget of {size(most)}"
    stdout().print(f"{size(num_bytes)} of caches, {size(pinned)} of them pinned; {words}")
    if evicted:
        stdout().print(f"{evicted} caches were evicted")


def rekey(
    key: Annotated[Path, typer.Argument(help="File of the new key.", show_default=False, metavar="KEYFILE")],
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encrypt everything here under a new key: caches, conversations and archives, all tenants'.

    KVRAG_STORE_KEY has the key of now; kvrag keygen --secret KEYFILE makes a new one. Nobody else may have
    the folder open. Interrupted, run it again: until it is through, keep both keys.

    Example: kvrag rekey new.key
    """
    from kvrag.rekeying import rekey_home  # noqa: PLC0415

    old = store_key()
    if old is None:
        raise InputError("KVRAG_STORE_KEY is not set: it names the key that all here is encrypted with now")
    new = secret(key)
    assert new is not None  # a file was given
    place = open_home(folder, chroma, "kvrag")
    with progress_bar("encrypting anew") as progress:
        done = rekey_home(place, old, new, progress=progress)
    if as_json:
        print_json(asdict(done))
        return
    what = (count(done.entries, "cache"), count(done.sessions, "conversation"), count(done.spans, "span"))
    is_some = done.entries or done.sessions or done.spans
    told = f"{', '.join(what)} encrypted anew" if is_some else "nothing was left to encrypt anew"
    stdout().print(f"{told}; from now on: KVRAG_STORE_KEY={key}")
