"""Attention over segments, and the update of a cascade: fast paths, each beside its definition."""

from kvrag_kernels._backend import Backend, backend, using
from kvrag_kernels.cascade_update import CascadeUpdate, cascade_update, cascade_update_reference
from kvrag_kernels.segment_attention import (
    AnyRows,
    Attended,
    Group,
    PagedRows,
    QuantisedRows,
    RowMask,
    Rows,
    Turn,
    column_mass,
    column_scores,
    column_scores_reference,
    part_mass,
    parted_attention,
    segment_attention,
    segment_attention_many,
    segment_attention_reference,
)

__all__ = [
    "AnyRows",
    "Attended",
    "Backend",
    "CascadeUpdate",
    "Group",
    "PagedRows",
    "QuantisedRows",
    "RowMask",
    "Rows",
    "Turn",
    "backend",
    "cascade_update",
    "cascade_update_reference",
    "column_mass",
    "column_scores",
    "column_scores_reference",
    "part_mass",
    "parted_attention",
    "segment_attention",
    "segment_attention_many",
    "segment_attention_reference",
    "using",
]
