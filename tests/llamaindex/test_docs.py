"""The page's Python runs as it stands: LlamaIndex's starter with only the model's line exchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from chromadb.api.shared_system_client import SharedSystemClient

PAGE = Path(__file__).parents[2] / "docs" / "llamaindex.md"


def test_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], heard: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "people.txt").write_text("Neiia Kleiski. She lives in Naihaven. Her hobby is judo.")
    (tmp_path / "data" / "firms.txt").write_text("Peor Tools. The company sells boats, and nothing else.")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/llamaindex.md", "exec"), space)
    answer, *scores = capsys.readouterr().out.splitlines()
    assert answer.strip()
    assert [line.split()[1] for line in scores] == ["True"] * 2, "both nodes came from caches"
    first, second = (answer.raw["kvrag"]["documents"] for answer in heard.answers())
    assert [use["is_hit"] for use in first] == [False] * 2, "read for the first answer, and kept"
    assert [use["is_hit"] for use in second] == [True] * 2
    SharedSystemClient.clear_system_cache()
