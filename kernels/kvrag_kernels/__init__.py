"""Attention over segments, strides and the memories they fill: fast paths, each beside its definition."""

from kvrag_kernels._backend import Backend, backend, using
from kvrag_kernels.cascade_update import CascadeUpdate, cascade_update, cascade_update_reference
from kvrag_kernels.move_rows import Moving, Places, Spin, move_rows
from kvrag_kernels.segment_attention import (
    AnyRows,
    Attended,
    Group,
    PagedRows,
    Parts,
    QuantisedRows,
    RowMask,
    Rows,
    Turn,
    column_mass,
    part_mass,
    parted_attention,
    segment_attention,
    segment_attention_many,
    segment_attention_reference,
)
from kvrag_kernels.strided_prefill import (
    Scoring,
    Strided,
    column_scores,
    column_scores_reference,
    reduce_heads,
    strided_prefill,
)

__all__ = [
    "AnyRows",
    "Attended",
    "Backend",
    "CascadeUpdate",
    "Group",
    "Moving",
    "PagedRows",
    "Parts",
    "Places",
    "QuantisedRows",
    "RowMask",
    "Rows",
    "Scoring",
    "Spin",
    "Strided",
    "Turn",
    "backend",
    "cascade_update",
    "cascade_update_reference",
    "column_mass",
    "column_scores",
    "column_scores_reference",
    "move_rows",
    "part_mass",
    "parted_attention",
    "reduce_heads",
    "segment_attention",
    "segment_attention_many",
    "segment_attention_reference",
    "strided_prefill",
    "using",
]
