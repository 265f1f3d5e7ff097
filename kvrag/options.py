"""Options that several commands have, and what their texts mean. Imports nothing that is slow to import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrag.config import tenant_key
from kvrag.errors import ConfigError, InputError

if TYPE_CHECKING:
    from kvrag.store.tenants import Tenant

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Folder of collection and caches [KVRAG_HOME, else ./.kvrag].")
]
ChromaOption = Annotated[
    str | None, typer.Option("--chroma", help="Address of a Chroma server, http://localhost:8000.")
]
CollectionOption = Annotated[str, typer.Option("--collection", help="Name of the collection.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Folder or hub name of a model [the one used last; kvrag/reader]."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, ... [the GPU if there is one].")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
TenantOption = Annotated[
    str | None,
    typer.Option(
        "--tenant", help="Whose documents these are; the secret is in KVRAG_TENANT_KEY.", metavar="NAME"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")]


def tenant_named(name: str | None) -> Tenant | None:
    """The tenant of this name, with the secret of the environment; None for no name.

    Raises:
        ConfigError: a name without a secret, or a secret without a name: it was meant to be used.
    """
    secret = tenant_key()
    if name is None and secret is None:
        return None
    if name is None or secret is None:
        given, missing = "--tenant", "KVRAG_TENANT_KEY"
        if name is None:
            given, missing = missing, given
        raise ConfigError(
            f"{given} is given and {missing} is not; a tenant is a name, and a secret of 64 hexadecimal "
            "digits or a file that holds them"
        )
    from kvrag.store.tenants import Tenant  # noqa: PLC0415 - help texts must not wait for torch

    return Tenant(name, secret)


def parse_keep(text: str | None) -> int | float | None:
    """A number of documents, or a share of them."""
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise InputError(
            f"keep is {text!r}; expected a number of documents (4) or a share of them (0.5)"
        ) from error


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Numbers of layers."""
    if text is None:
        return None
    try:
        return tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError as error:
        raise InputError(f"layers is {text!r}; expected numbers of layers, such as 1 or 1,2") from error


def check_layers(layers: tuple[int, ...] | None, num_layers: int) -> None:
    """Refuse layers that there are not, and the last one, behind which nothing is left to prune."""
    if layers and not (min(layers) >= 0 and max(layers) < num_layers - 1):
        wrong = ", ".join(map(str, layers))
        raise InputError(
            f"layers is {wrong}; pruning by attention can use 0 to {num_layers - 2} of this model"
        )
