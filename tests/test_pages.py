"""What the pages tell people to type works as it stands, and prints what they say, but for figures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TYPED = ("tutorial", "tenants")
PYTHON = {  # and what it prints
    "archive": "The hobby of Neiia Kleiski is rowing.",
    "chat": "The hobby of Neiia Kleiski is rowing.",
    "own-documents": "judo",
    "own-model": "recommended: ",
    "pictures": "segments.png",
    "policies": "Naihaven",
    "sessions": "Naihaven",
}


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / f"{page}.md").read_text(), flags=re.M | re.S)


def steps(page: str) -> list[tuple[str, str]]:
    """Commands, and what the page says that they print."""
    found = []
    for block in blocks(page, "console"):
        for step in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, printed = step.partition("\n")
            found.append((command, printed))
    return found


def without_figures(text: str) -> str:
    """Numbers, names made of digests and bars stand for any others."""
    text = re.sub(r"[0-9a-f]{2}/[0-9a-f]{12}…", "ID", text)
    text = re.sub(r"%\s+#*\s+", "% BAR ", text)
    text = re.sub(r"\d[\d.,]*", "N", text)
    return re.sub(r"[ \t]+", " ", text).strip()


@pytest.mark.slow
@pytest.mark.parametrize("page", TYPED)
def test_commands_print_what_the_page_says(page: str, tmp_path: Path) -> None:
    typed = steps(page)
    assert len(typed) >= 5
    # One shell, so that what is exported stays; a line of its own tells the outputs apart.
    script = "".join(f"{command}\nprintf '\\n=====\\n'\n" for command, _ in typed)
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "COLUMNS": "80"}
    environment.pop("KVRAG_HOME", None)
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("\n=====\n")
    for (command, said), found in zip(typed, printed, strict=False):
        assert (command, without_figures(found)) == (command, without_figures(said))
    for block in blocks(page, "python"):
        run(block, tmp_path)
    if page == "tutorial":
        assert (tmp_path / "answer.png").stat().st_size > 5000


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:kvrag", "-c", code],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page: str, tmp_path: Path) -> None:
    printed = "".join(run(block, tmp_path) for block in blocks(page, "python"))
    assert PYTHON[page] in printed


def test_pages_of_the_menu_are_all_there() -> None:
    menu = (DOCS.parent / "mkdocs.yml").read_text()
    named = set(re.findall(r"([a-z-]+)\.md\b", menu))
    assert named == {path.stem for path in DOCS.glob("*.md")}
