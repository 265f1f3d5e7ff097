"""kvrag export, import, keygen: a collection as one file, and who vouches for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvrag.cli.opening import load_engine, open_home, secret
from kvrag.options import (
    ChromaOption,
    CollectionOption,
    DeviceOption,
    DtypeOption,
    HomeOption,
    JsonOption,
    TenantOption,
)
from kvrag.terminal import bytes_bar, count, print_json, progress_bar, size, stdout, tell


def export(
    file: Annotated[Path, typer.Argument(help="The file to write.", show_default=False, metavar="FILE")],
    sign: Annotated[
        Path | None, typer.Option("--sign", help="Sign it with this private key.", metavar="KEYFILE")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", help="Seal it with the secret in this file [KVRAG_STORE_KEY].", metavar="KEYFILE"
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Seal nothing, although the caches here are encrypted.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the collection into one file: documents, vectors, settings, and caches as they lie.

    From encrypted caches comes a sealed file, which nobody can read without its key; any other file is as
    private as the documents. On another machine its caches are used by the same model in the same dtype only.

    Example: kvrag export notes.kvrag --sign mykey
    """
    from kvrag.portable import export_collection, private_key  # noqa: PLC0415 - help must not wait for torch

    place = open_home(folder, chroma, collection, tenant)
    signing_key, seal_key = None if sign is None else private_key(sign), secret(key)
    with progress_bar("exporting") as progress:
        report = export_collection(
            place,
            file,
            key=signing_key,
            seal_key=seal_key,
            plain=plain,
            replace=force,
            progress=progress,
        )
    if as_json:
        print_json(asdict(report))
        return
    caches = f"{count(report.entries, 'cache')}, {size(report.num_bytes)}"
    stdout().print(f"{count(report.records, 'chunk')}, {caches} in {file}")
    if report.sealed_with is not None:
        stdout().print(f"sealed with the key {report.sealed_with[:8]}")
    if report.signer is not None:
        stdout().print(f"signed by {report.signer}")
    if plain:
        tell("note", f"{file} is not sealed: whoever has it can read documents and caches")
    if report.uncached:
        tell("note", f"{report.uncached} chunks have no cache, and are exported without")


def import_file(
    file: Annotated[
        Path, typer.Argument(help="A file that kvrag export wrote.", show_default=False, metavar="FILE")
    ],
    trust: Annotated[
        list[str] | None,
        typer.Option("--trust", help="Accept what this public key signed.", metavar="PUBLICKEY"),
    ] = None,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Accept a file that nobody signed.")
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", help="The secret that a sealed file needs [KVRAG_STORE_KEY].", metavar="KEYFILE"
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the file's text where ids are the same.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Say which caches this model can use here.", metavar="MODEL"),
    ] = None,
    usable_only: Annotated[
        bool, typer.Option("--usable-only", help="Leave out caches that --model cannot use.")
    ] = False,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Bring a file's documents and caches into the collection.

    Everything is proven before anything is changed; done twice, it changes nothing. Caches say what a model
    reads in documents: take them from whom you trust.

    Example: kvrag import notes.kvrag --trust alice.pub
    """
    from kvrag.errors import InputError  # noqa: PLC0415
    from kvrag.portable import import_collection, public_key  # noqa: PLC0415

    if usable_only and model is None:
        raise InputError("--usable-only needs to know for which model; add --model")
    keys, seal_key = [public_key(text) for text in trust or []], secret(key)
    place = open_home(folder, chroma, collection, tenant)
    usable_by = None
    if model is not None:
        with load_engine(place, model, device, dtype) as engine:
            usable_by = engine.model.fingerprint()
    with bytes_bar("proving") as progress:
        report = import_collection(
            place,
            file,
            trust=keys,
            allow_unsigned=allow_unsigned,
            seal_key=seal_key,
            replace=replace,
            usable_by=usable_by,
            usable_only=usable_only,
            progress=progress,
        )
    if as_json:
        print_json(asdict(report))
        return
    out = stdout()
    changed = f", {report.replaced} replaced" if report.replaced else ""
    caches = count(report.entries, "cache")
    out.print(f"{count(report.records, 'chunk')}: {report.added} added{changed}; {caches} added")
    for kind, number in sorted(report.made_by.items()):
        digest, _, element = kind.partition(" ")
        out.print(f"{count(number, 'cache')} of model {digest}, {element}; {report.model} was used last")
    if report.unusable:
        tell("note", f"{model} cannot use {report.unusable} of them here (other weights or dtype)")
    if report.skipped:
        tell("note", f"{report.skipped} caches were left out: nothing here can use them")


def keygen(
    file: Annotated[Path, typer.Argument(help="The key's file.", show_default=False, metavar="FILE")],
    secret: Annotated[
        bool, typer.Option("--secret", help="A secret that encrypts: for stores, exports, tenants.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a pair of keys: FILE signs exports and stays with you, FILE.pub is for those who import them.

    With --secret, FILE is what stores (KVRAG_STORE_KEY) and exports (--key) are encrypted with instead.

    Example: kvrag keygen mykey
    """
    from kvrag.errors import ConfigError, InputError  # noqa: PLC0415
    from kvrag.keys import write_key  # noqa: PLC0415
    from kvrag.portable import make_keys  # noqa: PLC0415

    if secret:
        try:
            write_key(file)
        except ConfigError as error:
            raise InputError(str(error)) from error
        told = {"secret": str(file)}
        lines = [f"{file} encrypts: keep it to yourself, and a copy; without it nothing can be read"]
    else:
        public, line = make_keys(file)
        told = {"private_key": str(file), "public_key_file": str(public), "public_key": line}
        lines = [f"{file} signs exports: keep it to yourself", f"{public} is for others: {line}"]
    if as_json:
        print_json(told)
        return
    for line in lines:
        stdout().print(line)
