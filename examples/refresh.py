"""Runs the notebooks of this folder and stores their outputs, without what differs from machine to machine.

python examples/refresh.py                       all of them
python examples/refresh.py 01_quick_start        some of them
python examples/refresh.py --model FOLDER ...    with another model, to look at; nothing is stored
"""

from __future__ import annotations

import argparse
import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import papermill
from PIL import Image

FOLDER = Path(__file__).parent


def notebooks() -> list[Path]:
    """All of them, in order."""
    return sorted(FOLDER.glob("[0-9]*.ipynb"))


def run(path: Path, folder: Path, **parameters: Any) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run from its first cell to its last.

    Args:
        path: the notebook; it is not changed.
        folder: where it runs.
        parameters: values for names in its cell of parameters.

    Raises:
        papermill.PapermillExecutionError: a cell failed.
    """
    return papermill.execute_notebook(
        str(path),
        str(folder / path.name),
        parameters,
        cwd=str(folder),
        kernel_name="python3",
        progress_bar=False,
    )


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same without times, paths and versions of the machine that ran it."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    return notebook


def _smaller(picture: str) -> str:
    """A picture in 64 colours, as Base64."""
    written = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(64).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="notebooks, by their names without .ipynb")
    parser.add_argument("--model", help="run with this model, and store nothing")
    arguments = parser.parse_args()
    for path in notebooks():
        if arguments.names and path.stem not in arguments.names:
            continue
        print(path.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            if arguments.model:
                run(path, Path(folder), MODEL=arguments.model)
            else:
                nbformat.write(clean(run(path, Path(folder))), path)


if __name__ == "__main__":
    main()
