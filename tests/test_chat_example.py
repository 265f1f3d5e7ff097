"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_chat_goes_on_where_it_was_left(tmp_path: Path) -> None:
    def talk(*lines: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "chat.py")],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    out, told = talk("Mia lives in Varn.", "Where does Mia live?")
    assert len(out.splitlines()) == 2
    assert "0 turns so far" in told
    out, told = talk("Where does Mia live?")
    assert len(out.splitlines()) == 1
    assert "2 turns so far" in told
    assert "[read " in told
