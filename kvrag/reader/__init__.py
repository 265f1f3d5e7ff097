"""The small reader model that ships with kvrag, the made-up world it was trained on, and its evaluation."""

from __future__ import annotations

from pathlib import Path

NAME = "kvrag/reader"


def path() -> Path:
    """Folder of the model, as `AutoModelForCausalLM.from_pretrained` takes it."""
    return Path(__file__).parent / "model"
