"""Training: the loop, its state, its settings made real, and what a training would take."""

from paqdetr.training.callbacks import Callback
from paqdetr.training.train import train

__all__ = ["Callback", "train"]
