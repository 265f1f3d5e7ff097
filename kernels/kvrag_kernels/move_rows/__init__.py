"""Rows of a memory that go to other slots, keys turned on the way: what cascades and ladders decide."""

from __future__ import annotations

from collections.abc import Sequence

from kvrag_kernels._backend import backend
from kvrag_kernels.move_rows.reference import move_rows_reference
from kvrag_kernels.move_rows.types import Moving, Places, Spin, check

__all__ = ["Moving", "Places", "Spin", "move_rows", "move_rows_reference"]


def move_rows(rows: Sequence[Moving], places: Places) -> None:
    """Write to some slots of each tensor what lies elsewhere in it, or is new; all else stays as it is.

    Within a layer everything is read before anything is written, so slots may change places, and a tensor
    may be read for another one (keys before their rotation, for the rotated ones) and written itself.

    Args:
        rows: tensors in place, of any layers; those of a layer belong together.
        places: the same for all of them, but for the layers' and heads' sources.

    Raises:
        ValueError: sizes or dtypes that do not fit each other.

    Rotation: RoPE (Su et al. 2021, arXiv:2104.09864); the difference of positions times the frequency in
    float64, rows in float32, rounded once.
    """
    check(rows, places)
    if rows and backend(rows[0].into.device) == "triton":
        from kvrag_kernels.move_rows import launch  # noqa: PLC0415 - needs triton

        if launch.is_supported(rows):
            return launch.move_rows_triton(rows, places)
    return move_rows_reference(rows, places)
