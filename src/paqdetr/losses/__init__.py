"""What a detector is trained to minimise."""

from paqdetr.losses.criterion import Criterion, LossReport, build_criterion

__all__ = ["Criterion", "LossReport", "build_criterion"]
