"""The public names: what `import kvrag` offers, what it loads, and what an error can be caught as."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import kvrag
from kvrag import errors

NEED_CHROMA = ["Archive", "Corpus", "Index", "Recall", "ask"]


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_are_sorted_and_all_there() -> None:
    assert sorted(kvrag.__all__) == kvrag.__all__
    assert {"Engine", "Model", "Sampling", "Answer", "AnswerStream", "RagPrompt"} <= set(kvrag.__all__)
    for name in [*kvrag.__all__, *NEED_CHROMA]:
        assert getattr(kvrag, name) is not None
        assert name in dir(kvrag)


def test_names_are_where_type_checkers_look_for_them() -> None:
    """What is imported for type checkers is what the lazy lookup gives, and nothing else is."""
    tree = ast.parse(Path(kvrag.__file__).read_text(encoding="utf-8"))
    stated = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvrag.")
        for alias in node.names
    }
    assert set(stated) == {*kvrag.__all__, *NEED_CHROMA} - {"__version__"}
    for name, module in stated.items():
        assert getattr(importlib.import_module(module), name) is getattr(kvrag, name)


def test_every_error_is_public() -> None:
    defined = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert defined <= set(kvrag.__all__)
    assert all(issubclass(getattr(errors, name), errors.KVRagError) for name in defined)


def test_version_is_that_of_the_distribution() -> None:
    assert kvrag.__version__ == version("kvrag")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kvrag' has no attribute 'Motor'"):
        kvrag.Motor  # noqa: B018


@pytest.mark.parametrize("error", [errors.CacheMiss("no entry"), errors.DocumentNotFound("no document")])
def test_messages_of_key_errors_are_plain(error: KeyError) -> None:
    assert str(error).startswith("no ")


def test_importing_the_package_loads_neither_torch_nor_chroma() -> None:
    code = (
        "import sys, json, kvrag\n"
        "print(json.dumps([n in sys.modules for n in ('torch', 'chromadb', 'transformers')]))"
    )
    assert json.loads(in_a_fresh_process(code)) == [False, False, False]


def test_an_engine_without_an_archive_does_without_chroma() -> None:
    code = "import sys, kvrag.engine; print('chromadb' in sys.modules)"
    assert in_a_fresh_process(code).strip() == "False"
