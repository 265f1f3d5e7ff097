"""What the benchmarks of the kernels share: parts and steps, floors, and the page that shows them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvrag.testing.models import tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("on_gpu", "batch", "kernels_parts.page", "kernels_parts.limits")
WITHOUT_GPU = {"linear", "compiled"}  # parts that mean nothing on one, or need none


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """Modules of the benchmarks, found as when they are run as scripts."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        # By its file: the folder of the same name is a package to Python.
        spec = spec_from_file_location("benchmark_of_kernels", BENCHMARKS / "kernels.py")
        assert spec is not None
        assert spec.loader is not None
        kernels = module_from_spec(spec)
        spec.loader.exec_module(kernels)
        yield {"kernels": kernels, **{name: import_module(name) for name in NAMES}}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in {"kernels_parts", "on_gpu", "batch", "ttft"}:
                del sys.modules[name]


def test_every_part_is_a_step_on_a_gpu_and_has_its_place_on_the_page(bench: dict[str, ModuleType]) -> None:
    on_gpu, page = bench["on_gpu"], bench["kernels_parts.page"]
    parts = list(bench["kernels"].parts())
    assert set(parts) - WITHOUT_GPU == {*on_gpu._PARTS, *on_gpu._ON_REQUEST}
    steps = on_gpu.steps(Path("into"), Path("pytest.ini"), smoke=False)
    for name in set(parts) - WITHOUT_GPU:
        assert steps[name].command[:3] == ("benchmarks/kernels.py", "--only", name)
    for step in steps.values():
        assert step.command[0] == "-m" or (BENCHMARKS.parent / step.command[0]).is_file()
    assert set(page.COLUMNS) == set(parts) - {"limits", "tuning"}
    for part in page.COLUMNS:
        assert f"<!-- cpu: {part} -->" in page.TEXT.read_text()
        assert (f"<!-- gpu: {part} -->" in page.TEXT.read_text()) is (part not in WITHOUT_GPU)


def test_steps_are_chosen_by_name(bench: dict[str, ModuleType]) -> None:
    on_gpu = bench["on_gpu"]
    names = list(on_gpu.steps(Path("into"), Path("pytest.ini"), smoke=False))
    assert names[0] == "tests"
    assert on_gpu.chosen(names, None) == [name for name in names if name != "tuning"]
    assert on_gpu.chosen(names, ["tuning", "limits"]) == ["limits", "tuning"]
    with pytest.raises(SystemExit, match=r"no step flight; there are: tests, limits"):
        on_gpu.chosen(names, ["flight"])


def test_what_was_measured_before_stays_in_the_file(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    """A second run measures other parts; a failed one takes nothing away."""
    collect, file = bench["on_gpu"].collect, tmp_path / "gpu.json"
    for part, exit_status in (("segment", 0), ("decode", None)):
        folder = tmp_path / part
        folder.mkdir()
        (folder / "kernels.json").write_text(json.dumps({part: {"rows": [{"a": 1}]}}))
        collect(folder, {"date": "today", "versions": {}, "steps": {part: {"exit": exit_status}}}, file)
    found = json.loads(file.read_text())
    assert set(found["measured"]["kernels"]) == {"segment", "decode"}
    assert found["steps"] == {"segment": {"exit": 0}, "decode": {"exit": None}}
    assert json.loads((tmp_path / "decode" / "summary.json").read_text())["steps"].keys() == {"decode"}


@pytest.mark.parametrize("shared", [False, True])
def test_of_the_table_of_embeddings_only_what_is_looked_up_counts(
    bench: dict[str, ModuleType], shared: bool
) -> None:
    network: Any = tiny("llama").network
    before = network.get_output_embeddings().weight
    table = network.get_input_embeddings().weight
    every = sum(parameter.nbytes for parameter in network.parameters())
    weight_bytes = bench["kernels_parts.limits"].weight_bytes
    if not shared:
        assert weight_bytes(network, 3) == every - table.nbytes + 3 * table.shape[1] * table.itemsize
        assert weight_bytes(network, 10**9) == every
        return
    try:
        network.get_output_embeddings().weight = table
        assert weight_bytes(network, 3) == every - before.nbytes
    finally:
        network.get_output_embeddings().weight = before


def cpu(part: str, **row: Any) -> dict[str, Any]:
    conditions = {
        "device": "a processor", "threads": 1, "torch": "2", "python": "3", "date": "2026-01-02", "load": 1.5,
    }  # fmt: skip
    return {part: {"conditions": conditions, "rows": [row]}}


def test_the_page_shows_ratios_of_a_cpu_and_says_what_is_missing(bench: dict[str, ModuleType]) -> None:
    page = bench["kernels_parts.page"]
    row = {"model": "m", "documents": 10, "tokens": 512, "floor ms": 50.0, "over one run ms": 80.0}
    found = page.page(cpu("decode", **row), None, None)
    assert "| m | 10 | 512 | 0.62 |" in found
    assert "ms |" not in found
    assert page.COMMAND in found
    assert "**Not measured.**" in found
    assert found.count("On a GPU: not measured.") == len(page.COLUMNS) - len(WITHOUT_GPU)
    assert "<!-- cpu" not in found


def test_the_page_shows_what_a_gpu_gave_and_which_steps_failed(bench: dict[str, ModuleType]) -> None:
    page = bench["kernels_parts.page"]
    gpu = {
        "date": "2026-01-03",
        "versions": {"device": "a card", "torch": "2", "triton": "3", "transformers": "5"},
        "steps": {"segment": {"exit": 0}, "strided": {"exit": None}},
        "measured": {"kernels": cpu("segment", shape="s", us=12.5)},
    }
    found = page.page(cpu("moving rows", what="w"), gpu, None)
    assert "a card, torch 2, triton 3, transformers 5, 2026-01-03" in found
    assert "did not end well: strided." in found
    assert "| s | 12.5 |" in found
    assert "**Not measured.**" not in found


def test_callers_are_compared_with_every_other_way(bench: dict[str, ModuleType]) -> None:
    pairs = {"together": [(8.0, 1.0), (10.0, 2.0), (90.0, 3.0)], "turns": [], "batched": [(5.0, 8.0)]}
    found = bench["batch"]._medians(pairs)
    assert found == {
        "tokens_per_second_together": 10.0,
        "first_token_together": 2.0,
        "tokens_per_second_batched": 5.0,
        "first_token_batched": 8.0,
        "ratio_tokens_batched": 2.0,
        "ratio_first_token_batched": 4.0,
    }
    assert "batched" in bench["batch"].report("m", [{"callers": 4.0, **found}])


@pytest.mark.slow
def test_a_padded_batch_of_generate_gives_everybody_his_token(bench: dict[str, ModuleType]) -> None:
    model = tiny("llama")
    rate, first = bench["batch"].batched(model, [[5, 6, 7], [8, 9], [10] * 9], 3)
    alone_rate, alone = bench["batch"].one_by_one(model, [[5, 6, 7], [8, 9]], 3)
    assert min(rate, first, alone_rate, alone) > 0
    assert torch.is_inference_mode_enabled() is False
