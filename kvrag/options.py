"""Options that several commands have, and what their texts mean. Imports nothing that is slow to import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvrag.errors import InputError

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
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")]


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
