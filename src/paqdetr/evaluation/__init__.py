"""One pass over a data set: figures, predictions, and observers of the raw outputs."""

from paqdetr.evaluation.evaluate import Evaluation, evaluate
from paqdetr.evaluation.predict import predict_folder

__all__ = ["Evaluation", "evaluate", "predict_folder"]
