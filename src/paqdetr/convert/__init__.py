"""Weights of other programs as models of ours: key maps, one file a program, and a report that accounts for every tensor."""

from paqdetr.convert.classes import COCO
from paqdetr.convert.conversion import LAYOUTS, OWN, ConversionReport, Origin, convert_checkpoint

__all__ = ["COCO", "LAYOUTS", "OWN", "ConversionReport", "Origin", "convert_checkpoint"]
