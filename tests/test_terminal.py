"""What goes to standard error: whole lines in pipes; words and colours on terminals."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

CODE = "from kvrag.terminal import tell; tell('error', 'nothing is there ' * 12 + 'end')"


def on_a_terminal(columns: int) -> str:
    """What the code writes to a terminal of this width."""
    main, other = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    subprocess.run([sys.executable, "-c", CODE], stderr=other, env=environment, check=True)
    os.close(other)
    shown = b""
    while chunk := _read(main):
        shown += chunk
    os.close(main)
    return shown.decode()


def _read(file: int) -> bytes:
    try:
        return os.read(file, 4096)
    except OSError:  # the other side is closed
        return b""


def test_a_message_is_one_plain_line_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stderr == f"error: {'nothing is there ' * 12}end\n"


def test_a_terminal_gets_lines_that_end_between_words_and_colour() -> None:
    shown = on_a_terminal(40)
    lines = shown.replace("\r", "").splitlines()
    assert "\x1b[" in lines[0]
    plain = [line for line in lines[1:] if line]
    assert max(map(len, plain)) <= 40
    assert all(line.split()[-1] in {"nothing", "is", "there", "end"} for line in plain)
