"""What runs a detector without torch: engines of exported models, sources of pictures, tiles, and results on the disk."""

from paqdetr.runtime.info import ExportInfo, FixedSize
from paqdetr.runtime.predictor import Predictor, open_exported, predict_in_batches
from paqdetr.runtime.tiles import Tiles

__all__ = ["ExportInfo", "FixedSize", "Predictor", "Tiles", "open_exported", "predict_in_batches"]
