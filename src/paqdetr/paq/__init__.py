"""The paper, one idea a file: pattern queries, quality-aware assignment, and their losses.

Needs torch, torchvision and scipy alone, and nothing else of paqdetr but its plain structures.
"""

from paqdetr.paq.assignment import Assigner, OneToOneAssigner, Pairs, QualityAwareAssigner, match_layers
from paqdetr.paq.costs import CostWeights, Matchables
from paqdetr.paq.losses import focal_loss, pattern_diversity_loss, varifocal_loss
from paqdetr.paq.patterns import Mixture, PatternQueries

__all__ = [
    "Assigner",
    "CostWeights",
    "Matchables",
    "Mixture",
    "OneToOneAssigner",
    "Pairs",
    "PatternQueries",
    "QualityAwareAssigner",
    "focal_loss",
    "match_layers",
    "pattern_diversity_loss",
    "varifocal_loss",
]
