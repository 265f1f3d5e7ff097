"""The layout of the packages, what they import, and what no file may contain."""

from __future__ import annotations

import lzma
import re
import subprocess
import sys
import tomllib
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kvrag
import kvrag_kernels

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
IGNORED = {"__pycache__", ".venv", ".git", "site", "dist", "build"}


def files_under(*folders: str) -> list[Path]:
    """Files of folders that exist, without caches."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return sorted(path for path in found if not IGNORED & set(path.parts))


PACKAGES = ["kvrag", "kernels", "integrations"]
CODE = [path for path in files_under(*PACKAGES) if path.suffix == ".py"]


# ---- layout


def test_import_roots_are_no_packages() -> None:
    """transformers imports a package called `kernels`; llama_index is a namespace that others share."""
    roots = ["kernels", "integrations", "integrations/llama_index", "tests", "examples", "benchmarks"]
    kinds = [str(path.relative_to(ROOT)) for path in (ROOT / "integrations/llama_index").glob("*")]
    assert [root for root in roots + kinds if (ROOT / root / "__init__.py").exists()] == []
    assert [path for path in files_under("tests") if path.name == "__init__.py"] == []


def test_kernels_holds_only_kvrag_kernels() -> None:
    assert {path.relative_to(ROOT / "kernels").parts[0] for path in files_under("kernels")} == {
        "kvrag_kernels"
    }


def test_only_leaf_packages_are_typed() -> None:
    typed = {
        path.parent.relative_to(ROOT).as_posix() for path in files_under(*PACKAGES) if path.name == "py.typed"
    }
    assert {"kvrag", "kernels/kvrag_kernels"} <= typed
    for folder in typed:
        assert (ROOT / folder / "__init__.py").exists(), f"{folder} is typed, but no package"
        assert not (ROOT / folder).parent.joinpath("__init__.py").exists(), (
            f"{folder} is not the top of its package"
        )


def test_every_package_is_in_the_wheel() -> None:
    shipped = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for path in CODE:
        name = path.relative_to(ROOT).as_posix()
        assert any(name.startswith(f"{folder}/") for folder in shipped), (
            f"{name} is in no package of the wheel"
        )


# ---- names and versions


def test_public_names_are_sorted_and_resolve() -> None:
    assert list(kvrag.__all__) == sorted(set(kvrag.__all__))
    for name in kvrag.__all__:
        assert getattr(kvrag, name) is not None


def test_one_version_everywhere() -> None:
    stated = PYPROJECT["project"]["version"]
    assert version("kvrag") == stated, "installed from another pyproject.toml; run: make setup"
    assert getattr(kvrag, "__version__", stated) == stated
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert not headings[1:] or headings[1] == stated, "the newest version in the changelog is another one"


def test_metadata_is_filled_in() -> None:
    told = metadata("kvrag")
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Author"] == "The kvrag developers"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_constraints_pin_every_dependency() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines), (
        "exact versions only, no builds and no places"
    )
    pins = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(text) for text in project["dependencies"] + extras["dev"] + extras["docs"] + extras["pdf"]
    ]
    for requirement in wanted:
        if requirement.name != "kvrag":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


# ---- imports


@pytest.mark.slow
@pytest.mark.parametrize("package", [kvrag.__name__, kvrag_kernels.__name__])
def test_packages_import_without_databases_and_frameworks(package: str) -> None:
    code = f"""
import sys
for name in ("chromadb", "langchain_core", "llama_index", "triton", "pypdf"):
    sys.modules[name] = None  # type: ignore[assignment]
import {package}
for name in getattr({package}, "__all__", ()):
    getattr({package}, name)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- what no file may contain


FORBIDDEN = {
    "a pickle runs code when it is read": r"^\s*(?:import|from)\s+(?:pickle|dill|joblib|cloudpickle)\b",
    "torch.load reads pickles": r"\btorch\.(?:load|save)\(",
    "numpy reads pickles if told to": r"allow_pickle\s*=\s*True",
}
HOST = re.compile(
    r"\bhttps?://(?!localhost\b|127\.0\.0\.1\b|\[::1\]|(?:[\w-]+\.)?example\.(?:com|org|net)\b)[\w.-]+"
)
MACHINE = re.compile(r"(?<![\w.:/])/(?:work|home|root|Users|opt|mnt|scratch)/\w")
TOP = ["pyproject.toml", "constraints.txt", "Makefile", ".pre-commit-config.yaml", ".ci/run", "mkdocs.yml"]


@pytest.mark.parametrize("why", FORBIDDEN)
def test_package_code_is_safe_to_load_data_with(why: str) -> None:
    pattern = re.compile(FORBIDDEN[why], flags=re.MULTILINE)
    assert [str(path) for path in CODE if pattern.search(path.read_text())] == []


@pytest.mark.parametrize("pattern", [HOST, MACHINE], ids=["hosts", "machine paths"])
def test_no_hosts_and_no_machine_paths(pattern: re.Pattern[str]) -> None:
    # Plots have the names of XML namespaces, which look like hosts.
    skipped = {".safetensors", ".pdf", ".png", ".svg"}
    texts = [path for path in files_under(*PACKAGES, "docs") if path.suffix not in skipped]
    texts += [ROOT / name for name in TOP if (ROOT / name).exists()]
    found = {str(path): match.group() for path in texts if (match := pattern.search(_text(path)))}
    assert found == {}


def _text(path: Path) -> str:
    """What a file says, unpacked."""
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
