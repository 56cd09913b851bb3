"""One pass over a data set: figures, predictions, and observers of the raw outputs."""

from paqdetr.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
