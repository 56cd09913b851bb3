"""Detectors as compositions of small parts: backbone, neck, encoder, starts, queries, denoising, decoder."""

from paqdetr.models.detector import Detector, DetectorOutput
from paqdetr.models.files import ReshapeReport, load, reshape_classes, resize_queries, save, start_from
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
    "save",
    "start_from",
]
