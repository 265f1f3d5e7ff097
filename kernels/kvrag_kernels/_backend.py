"""Which implementation computes: decided here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Backend = Literal["reference", "cpu", "triton"]

VARIABLE = "KVRAG_KERNELS"
"""Environment variable that names a backend; unset, empty or "auto": the fastest one that there is."""

_LEAST_CAPABILITY = (8, 0)  # bfloat16 matrix products

_forced: Backend | None = None


def backend(device: torch.device) -> Backend:
    """What computes on a device; whatever it cannot do falls back to plainer paths, call by call.

    Args:
        device: where the tensors are.

    Raises:
        ValueError: a backend was asked for that does not exist or cannot run on this device.
    """
    wanted = _forced or os.environ.get(VARIABLE) or "auto"
    if wanted == "auto":
        if device.type == "cpu":
            return "cpu"
        return "triton" if _runs_triton(device) else "reference"
    if wanted not in get_args(Backend):
        raise ValueError(f"{VARIABLE} is {wanted!r}; expected auto, {', '.join(get_args(Backend))}")
    if wanted == "triton" and not _runs_triton(device):
        raise ValueError(
            f"the triton backend cannot run on {device}: it needs the package triton and a CUDA device of "
            "compute capability 8.0 or later, or TRITON_INTERPRET=1 set before the first import; "
            f"unset {VARIABLE} or choose another backend"
        )
    return "reference" if wanted == "reference" else "cpu" if wanted == "cpu" else "triton"


@contextmanager
def using(name: Backend) -> Iterator[None]:
    """Let one backend compute for the whole process, whatever the environment says; for tests."""
    global _forced  # noqa: PLW0603 - one choice per process, as an environment variable is
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@cache
def has_triton() -> bool:
    """Whether the package is installed."""
    return find_spec("triton") is not None


def is_interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, slowly; it is read when they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}


def _runs_triton(device: torch.device) -> bool:
    if not has_triton():
        return False
    if device.type == "cuda":
        return _is_capable(device.index or 0)
    return device.type == "cpu" and is_interpreting()


@cache
def _is_capable(index: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= _LEAST_CAPABILITY
