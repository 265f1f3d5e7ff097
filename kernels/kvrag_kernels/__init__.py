"""Attention over segments: fast paths, each beside the plain function that defines it."""

from kvrag_kernels.segment_attention import (
    Attended,
    Group,
    RowMask,
    Rows,
    Turn,
    column_mass,
    part_mass,
    parted_attention,
    segment_attention,
    segment_attention_reference,
)

__all__ = [
    "Attended",
    "Group",
    "RowMask",
    "Rows",
    "Turn",
    "column_mass",
    "part_mass",
    "parted_attention",
    "segment_attention",
    "segment_attention_reference",
]
