"""Detectors as compositions of small parts: backbone, neck, encoder, starts, queries, denoising, decoder."""

from paqdetr.models.detector import Detector
from paqdetr.models.files import ReshapeReport, load, reshape_classes, resize_queries, start_from
from paqdetr.models.outputs import DetectorOutput
from paqdetr.models.zoo import create_model, list_models, list_recipes

__all__ = [
    "Detector",
    "DetectorOutput",
    "ReshapeReport",
    "create_model",
    "list_models",
    "list_recipes",
    "load",
    "reshape_classes",
    "resize_queries",
    "start_from",
]
