"""One place decides which implementation computes, and says why it cannot."""

from __future__ import annotations

import pytest
import torch

from kvrag_kernels import backend, using
from kvrag_kernels._backend import VARIABLE

CPU = torch.device("cpu")


def test_the_fastest_is_chosen_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in (None, "", "auto"):
        if said is None:
            monkeypatch.delenv(VARIABLE, raising=False)
        else:
            monkeypatch.setenv(VARIABLE, said)
        assert backend(CPU) == "cpu"


def test_the_environment_chooses_and_a_test_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "reference")
    assert backend(CPU) == "reference"
    with using("cpu"):
        assert backend(CPU) == "cpu"
    assert backend(CPU) == "reference"


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="KVRAG_KERNELS is 'fast'; expected auto, reference, cpu, triton"):
        backend(CPU)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with using("triton"), pytest.raises(ValueError, match="the triton backend cannot run on cpu"):
        backend(CPU)
