"""The paper, one idea a file: pattern queries, quality-aware assignment, and their losses.

Needs torch, torchvision and scipy alone, and nothing else of paqdetr but its plain structures and errors.
"""

from paqdetr.errors import NonFiniteError
from paqdetr.paq.assignment import (
    Assigner,
    FixedKAssigner,
    OneToOneAssigner,
    Pairs,
    QualityAwareAssigner,
    SimOTAAssigner,
    match_layers,
)
from paqdetr.paq.costs import CostWeights, MatchingCosts
from paqdetr.paq.losses import focal_loss, pattern_diversity_loss, varifocal_loss
from paqdetr.paq.patterns import Mixture, PatternQueries, StaticMixtures
from paqdetr.structures import Targets

__all__ = [
    "Assigner",
    "CostWeights",
    "FixedKAssigner",
    "MatchingCosts",
    "Mixture",
    "NonFiniteError",
    "OneToOneAssigner",
    "Pairs",
    "PatternQueries",
    "QualityAwareAssigner",
    "SimOTAAssigner",
    "StaticMixtures",
    "Targets",
    "focal_loss",
    "match_layers",
    "pattern_diversity_loss",
    "varifocal_loss",
]
