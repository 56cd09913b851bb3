"""Training, evaluation and prediction over whole data sets."""

from paqdetr.engine.evaluate import Evaluation, evaluate
from paqdetr.engine.events import Callback
from paqdetr.engine.interrupt import TrainingInterrupted
from paqdetr.engine.predict import predict_folder
from paqdetr.engine.run import Run
from paqdetr.engine.train import train

__all__ = ["Callback", "Evaluation", "Run", "TrainingInterrupted", "evaluate", "predict_folder", "train"]
