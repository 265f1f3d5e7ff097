"""Options that several commands have, and what their texts mean. Imports nothing that is slow to import."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrag.config import tenant_key
from kvrag.errors import ConfigError, InputError

if TYPE_CHECKING:
    from kvrag.store.tenants import Tenant

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", help="Folder of collection and caches [KVRAG_HOME, else ./.kvrag].", metavar="FOLDER"
    ),
]
ChromaOption = Annotated[
    str | None,
    typer.Option("--chroma", help="Address of a Chroma server: http://localhost:8000.", metavar="URL"),
]
CollectionOption = Annotated[
    str, typer.Option("--collection", help="Name of the collection.", metavar="NAME")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder or hub name of a model [the one used last, else kvrag/reader].",
        metavar="MODEL",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, ... [the GPU if there is one].", metavar="DEVICE"),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", metavar="DTYPE")
]
TenantOption = Annotated[
    str | None,
    typer.Option(
        "--tenant", help="Whose documents these are; the secret is in KVRAG_TENANT_KEY.", metavar="NAME"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")]


PathsArgument = Annotated[
    list[Path],
    typer.Argument(help="Files or folders: .txt .md .pdf .jsonl", show_default=False, metavar="PATH"),
]
NamesArgument = Annotated[
    list[str],
    typer.Argument(
        help="Ids of chunks, sources, or files; kvrag ls shows them.", show_default=False, metavar="NAME"
    ),
]
ChunkTokensOption = Annotated[
    int, typer.Option("--chunk-tokens", help="Longest chunk, in tokens.", min=1, metavar="NUMBER")
]
ByParagraphOption = Annotated[bool, typer.Option("--by-paragraph", help="Make each paragraph a chunk.")]
ContextOption = Annotated[
    str | None,
    typer.Option(
        "--context",
        help="Encode each chunk behind: before (the parts before it), similar:2, or alone. "
        "before/1024: at most so many tokens [as so far, at first before].",
        show_default=False,
        metavar="CONTEXT",
    ),
]
TtlOption = Annotated[
    str | None,
    typer.Option("--ttl", help="Time to live of caches: 30d, 12h, 90m; never [as so far].", metavar="TIME"),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="Most bytes of all caches: 20GB, 500MB; none [as so far].", metavar="SIZE"),
]
CodecOption = Annotated[
    str | None,
    typer.Option(
        "--codec",
        help="How caches are written: raw, fp8, int8 or int4 [as so far, at first raw]; auto: what --max-kl "
        "allows, measured once for a model.",
        metavar="CODEC",
    ),
]
LongestOption = Annotated[
    int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.", min=1, metavar="NUMBER")
]
TemperatureOption = Annotated[
    float,
    typer.Option("--temperature", help="0 always takes the likeliest token.", min=0.0, metavar="NUMBER"),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Makes answers above temperature 0 repeatable.", metavar="NUMBER"),
]
PinOption = Annotated[bool, typer.Option("--pin", help="Never evict the caches of these documents.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
ReceiptOption = Annotated[
    Path | None,
    typer.Option("--receipt", help="Write what was erased to this file, as JSON.", metavar="FILE"),
]
RateOption = Annotated[
    str | None, typer.Option("--rate", help="Read no more than so much a second: 100MB.", metavar="SIZE")
]

_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


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


def parse_size(text: str, name: str) -> int:
    """Bytes: 20GB is decimal, 20GiB binary, a bare number bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), flags=re.IGNORECASE)
    num_bytes = 0
    if found is not None:
        power = _UNITS[found[2].upper()] if found[2] else 0
        num_bytes = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if num_bytes <= 0:
        raise InputError(f"{name} is {text!r}; expected a size such as 500MB, 20GB or 16GiB")
    return num_bytes


def parse_budget(text: str) -> int | None:
    """Bytes, or None for `none`."""
    return None if text.strip().lower() == "none" else parse_size(text, "budget")


def parse_seconds(text: str) -> float | None:
    """Seconds of a time such as 30d, or None for `never`."""
    if text.strip().lower() == "never":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not 0 < seconds <= 100 * 365 * _SECONDS["d"]:
        raise InputError(f"ttl is {text!r}; expected a time such as 90m, 12h, 30d or 8w, or never")
    return seconds


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
