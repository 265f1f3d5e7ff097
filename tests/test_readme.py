"""The README's Python runs as it stands, and the files it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 6
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    space["engine"].close()  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    assert "Usage(" in printed
    assert "DocumentUse(" in printed
    assert printed.count("Naihaven") >= 3
    assert "The hobby of Neiia Kleiski is judo." in printed
    assert "'cache_read': " in printed
    assert "'cache_read': 0" not in printed


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
