"""Exported models, run without torch: numpy, Pillow and one engine (onnxruntime or OpenVINO)."""

from paqdetr.runtime.info import ExportInfo, FixedSize
from paqdetr.runtime.predictor import Predictor, open_exported, predict_in_batches

__all__ = ["ExportInfo", "FixedSize", "Predictor", "open_exported", "predict_in_batches"]
