"""Detectors as compositions of small parts: backbone, neck, encoder, proposals, queries, denoising, decoder."""

from paqdetr.models.detector import Detector, DetectorOutput
from paqdetr.models.zoo import create_model, list_models, load, save

__all__ = ["Detector", "DetectorOutput", "create_model", "list_models", "load", "save"]
