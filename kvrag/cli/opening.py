"""Opens what commands work on: the folder, and the model. Help texts must not wait for torch and chromadb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvrag.config import home
from kvrag.terminal import stderr


def open_home(folder: Path | None, chroma: str | None, collection: str) -> Any:
    """The `Home` of a command's options."""
    from kvrag.home import Home  # noqa: PLC0415 - help texts must not wait for torch and chromadb

    return Home(folder or home(), chroma=chroma, collection=collection)


def load_engine(
    place: Any, model: str | None, device: str | None, dtype: str, *, codec: str | None = None
) -> Any:
    """An engine with the folder's store; the folder's model and codec unless others are given."""
    from kvrag.engine import Engine  # noqa: PLC0415
    from kvrag.model import quiet  # noqa: PLC0415

    quiet()
    name = model or place.model()
    with stderr().status(f"loading {name}"):
        return Engine.from_pretrained(
            name, store=place.store(), device=device, dtype=dtype, codec=codec or place.codec()
        )


def warn_of_reader(engine: Any, place: Any) -> None:
    """Say what the shipped model is, the first time that a folder's documents are read by it."""
    from kvrag.model import READER  # noqa: PLC0415

    if engine.model.name == READER and not (place.exists() and READER in place.settings().forms):
        stderr().print(
            "note: kvrag/reader is a tiny model that only knows the made-up world of `kvrag demo`; "
            "name a real one for documents of your own, e.g. --model Qwen/Qwen2.5-7B-Instruct"
        )
