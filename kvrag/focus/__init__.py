"""What is done with a prompt's documents: where they stand, who is dropped, which rows are read again."""

from kvrag.focus.heats import Heats
from kvrag.focus.placement import Placed, Placement
from kvrag.focus.policy import (
    PLAIN,
    PRESETS,
    Policy,
    SecondLook,
    ape,
    cacheblend,
    cachefocus,
    epic,
    naive,
    pcw,
    preset,
    query_driven,
)
from kvrag.focus.pruning import (
    AttentionScore,
    GivenScore,
    NearScore,
    Pruning,
    RandomScore,
    RankScore,
    Scorer,
)
from kvrag.focus.repair import Deviation, FirstRows, QueryDriven, Repair
from kvrag.focus.risk import Risk
from kvrag_kernels import Group

__all__ = [
    "PLAIN",
    "PRESETS",
    "AttentionScore",
    "Deviation",
    "FirstRows",
    "GivenScore",
    "Group",
    "Heats",
    "NearScore",
    "Placed",
    "Placement",
    "Policy",
    "Pruning",
    "QueryDriven",
    "RandomScore",
    "RankScore",
    "Repair",
    "Risk",
    "Scorer",
    "SecondLook",
    "ape",
    "cacheblend",
    "cachefocus",
    "epic",
    "naive",
    "pcw",
    "preset",
    "query_driven",
]
