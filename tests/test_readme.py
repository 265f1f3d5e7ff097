"""The README's Python runs as it stands, and the files it names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert [sum(map(bool, block.splitlines())) for block in blocks] == [10, 8]
    space: dict[str, Any] = {}
    exec(compile(blocks[0], "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "The hobby of Neiia Kleiski is judo." in printed
    assert re.search(r"'cache_read': [1-9]", printed)

    exec(compile(blocks[1], "README.md", "exec"), space)
    assert capsys.readouterr().out.strip()
    engine = space["Settings"].llm.running
    assert engine is space["model"].running, "equal settings share one engine"
    used = engine.metrics()
    assert (sum(used.hits.values()), used.misses) == (4, 0), "both documents, for both answers"
    engine.close()


def test_is_one_screens_reading() -> None:
    assert len(README.splitlines()) <= 120


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
